"""What the scripts share. Rooms and the arrows between them: docs/architecture.md."""
