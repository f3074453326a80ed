"""Match passes: ATen subgraphs to canonical ops. One file a pass; helpers they share are named for what they read."""
