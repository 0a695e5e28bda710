# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: programs without Paddle, which ``build.py`` compiles for a GPU or, to try them, without."""
