"""Many runs of one recipe: which points there are, and how they are worked off. What came of them `report/` draws."""
