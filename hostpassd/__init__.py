"""hostpassd: which devices this host has, which virtual machine holds which, and handing them over and back."""

__version__ = "0.9.0"
