"""Errors, files, devices and progress; nothing in here knows of CT."""
