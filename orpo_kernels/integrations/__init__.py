"""The loss in fine-tuning frameworks: Axolotl, LLaMA-Factory and ms-swift, each by one file (`docs/frameworks.md`)."""
