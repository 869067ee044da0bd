"""Offline applications on Ray Data and Ray Train, one main each, in data order."""
