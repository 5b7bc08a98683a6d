"""Token-level credit assignment in agentic reinforcement learning: ActFocus and its relatives."""
