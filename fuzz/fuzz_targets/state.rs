#![no_main]
odmr_fuzz::fuzz!("state");
