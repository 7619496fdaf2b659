"""Picture sheets: crops, attention maps, patch features and nearest neighbors."""
