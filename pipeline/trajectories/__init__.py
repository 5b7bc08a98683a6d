"""What an episode is: its tokens and their roles; what the policy reads in it and what it has written."""
