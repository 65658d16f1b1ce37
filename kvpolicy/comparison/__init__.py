"""Methods side by side: one model, one task, equal budgets, and only such claims as the intervals carry."""
