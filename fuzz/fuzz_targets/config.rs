#![no_main]
odmr_fuzz::fuzz!("config");
