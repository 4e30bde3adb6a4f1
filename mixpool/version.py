"""The version, which records and commands name."""

VERSION = "0.2.0.dev0"
