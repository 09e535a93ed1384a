"""Tests of devices and memory."""
