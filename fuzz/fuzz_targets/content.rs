#![no_main]
odmr_fuzz::fuzz!("content");
