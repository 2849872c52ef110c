"""Arithmetic on FLOPs, bytes and messages. Nothing here is measured."""
