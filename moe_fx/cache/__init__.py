"""The compile cache: what a graph was lowered to, kept on disk so that the next process need not match it again.

* ``store``: entries on disk: written whole, private to their owner, hashed, bounded in size. Knows nothing of torch.
* ``key``: what a result depends on, in named components; ``graph_identity``, ``environment``, ``sources`` spell them.
* ``graph_codec``, ``report_codec``: a lowered graph and its report as JSON, and back.
* ``guards``: the conditions on sizes that the skipped steps would have put on the graph.
* ``listing``: entries and their state for the command line.
* ``graph_cache``: one compilation's use of all this.
* ``artifacts``: the same store for what a downstream compiler makes, where that compiler can dump and load it.

Entries are not part of ``torch.compiler.save_cache_artifacts``: a process that loads such artifacts before the backend
is imported knows no type of moe-fx's, and torch then drops all of them, Inductor's too.
"""
