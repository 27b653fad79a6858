"""Example plugin: an autoencoder architecture, `ista`.

    greatctl train --arch ista          (in a project whose plugins/ holds this folder)

What to notice:
* An architecture needs torch, and this file is run for every command. So the plugin is a folder: the hook
  stands here, the class in coder.py, and the target is a string that greatctl imports when someone asks for
  the architecture. The leading dot makes it relative to this plugin.
* The plugin's digest covers every file of the folder. Edit one, and whatever was trained with it is out of
  date.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from greatctl import hookimpl

if TYPE_CHECKING:
    from greatctl.extend.hookspecs import Register

__version__ = "1.0"


@hookimpl
def register_architectures(register: Register) -> None:
    """By name, so that torch stays out of the way until it is needed."""
    register("ista", ".coder:Ista")
