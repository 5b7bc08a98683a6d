"""The commands that people run by hand; the stages of the DAG are in stages/."""
