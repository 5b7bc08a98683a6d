"""How far work is, and how long its phases take: told to people, never part of a result."""
