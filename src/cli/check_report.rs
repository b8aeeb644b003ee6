//! The findings of `odmr check`, and how it describes a certificate.

use std::io;

use super::exit::{ExitError, Sysexit};
use super::process::{print, print_fitted};
use super::terminal::{has_colours, highlighted};
use crate::clock::{Clock, Timestamp};
use crate::net::tls::CertificateInfo;
use crate::provider::certificate::days_left;

/// The errors, warnings and notes that were found, each a line for the user.
#[derive(Default)]
pub(super) struct CheckReport {
    errors: Vec<String>,
    warnings: Vec<String>,
    /// Facts that the user may need.
    notes: Vec<String>,
}

impl CheckReport {
    /// Removes the warnings.
    pub fn drop_warnings(&mut self) {
        self.warnings.clear();
    }

    /// Adds an error, unless the report has it already.
    pub fn error(&mut self, text: impl ToString) {
        let text = text.to_string();
        if !self.errors.contains(&text) {
            self.errors.push(text);
        }
    }

    /// Adds a warning.
    pub fn warn(&mut self, text: impl ToString) {
        self.warnings.push(text.to_string());
    }

    /// Adds a note, unless the report has it already.
    pub fn note(&mut self, text: impl ToString) {
        let text = text.to_string();
        if !self.notes.contains(&text) {
            self.notes.push(text);
        }
    }

    /// Prints warnings and notes; then, if there are no errors, `summary`.
    ///
    /// # Errors
    ///
    /// All errors that were found.
    pub fn finish(self, summary: &str) -> Result<(), ExitError> {
        let word = highlighted("warning:", false, has_colours(io::stdout()));
        self.warnings.iter().try_for_each(|line| print_fitted(&format!("{word} {line}\n")))?;
        self.notes.iter().try_for_each(|line| print_fitted(&format!("{line}\n")))?;
        match self.errors.is_empty() {
            true => print(&format!("{summary}\n")),
            false => Err(check_error(self.errors.join("\nodmr: "))),
        }
    }
}

/// The error of a check that has found errors.
pub(super) fn check_error(text: impl ToString) -> ExitError {
    ExitError::new(Sysexit::CheckFailed, text)
}

/// The names of a certificate, for a person.
pub(super) fn names_of(certificate: &CertificateInfo) -> String {
    match certificate.names.is_empty() {
        true => "no name at all".to_owned(),
        false => certificate.names.join(", "),
    }
}

/// The end of a certificate, and the days that are left.
pub(super) fn validity(certificate: &CertificateInfo, now: Timestamp) -> Option<(Timestamp, i64)> {
    certificate.until.map(|until| (until, days_left(until, now)))
}

/// A certificate of a provider in one line: its names, its end, its pins.
pub(super) fn describe(certificate: &CertificateInfo) -> String {
    let [whole, key] = &certificate.pins;
    let (names, until) = (names_of(certificate), described_end(certificate));
    format!("for {names}{until}; pin = \"{whole}\", or pin = \"{key}\", which survives renewals")
}

/// A certificate of a customer in one line: its end, and its pins for the provider.
pub(super) fn describe_own(certificate: &CertificateInfo) -> String {
    let [whole, key] = &certificate.pins;
    let until = described_end(certificate);
    format!(
        "our own certificate{until}; in the provider's file of the account: certificate = [\"{whole}\"], or certificate = \
         [\"{key}\"], which survives renewals"
    )
}

fn described_end(certificate: &CertificateInfo) -> String {
    let until = validity(certificate, Clock::System.now());
    until.map_or_else(String::new, |(until, days)| {
        let days = if days == 1 { "1 day".to_owned() } else { format!("{days} days") };
        format!(", until {} ({days})", until.rfc3339())
    })
}
