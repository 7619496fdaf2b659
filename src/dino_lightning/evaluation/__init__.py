"""Features of frozen networks and what they are worth: classification, retrieval, video, attention, embedding."""
