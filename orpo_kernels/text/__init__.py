"""What a row of preference data says: its columns' names, its messages, and when text is a chat."""
