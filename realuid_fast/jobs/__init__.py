"""From a configuration to a trained network: settings in files become the objects that trainers take."""
