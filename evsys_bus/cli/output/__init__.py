"""What commands share to show results, progress and errors; commands of adapters may use it too."""
