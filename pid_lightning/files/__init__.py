"""What lies on disk."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"  # what the package ships
