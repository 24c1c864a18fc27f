"""Where a cache's bytes lie: its layout, the region that holds it, and how units are gathered and digested."""
