"""What an episode is: its tokens and their roles, its prompts, and records of it for readers."""
