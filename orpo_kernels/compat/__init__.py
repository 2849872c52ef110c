"""Other packages' interfaces to the ORPO loss, with the fused loss behind them."""
