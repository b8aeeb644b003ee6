//! Transcripts, as the tests of odmr read them.

#[path = "../../tests/transcripts/format.rs"]
pub mod format;
