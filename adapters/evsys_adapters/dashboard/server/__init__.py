"""The server of the dashboard: receives events, answers pages, pushes what changes.

From the outside in: connections with deadlines (`protocol`), who may call (`guards`), the routes (`app`) and what they
need (`bodies`, `ingest`, `imports`, `charts`, `live`, `frames`, `page_files`), and the thread that uses the database
(`store_thread`). `serve` runs it all.
"""

from evsys_adapters.dashboard.server.serve import DEFAULT_PORT, IDLE_SECONDS, DashboardServer, serve

__all__ = ["DEFAULT_PORT", "IDLE_SECONDS", "DashboardServer", "serve"]
