"""Answers as texts: pairs, similarity, rewards, judge."""
