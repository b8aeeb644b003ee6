//! What TLS tells an authentication: the mechanisms that depend on TLS have it from here.

/// What an authentication may use of the TLS connection that it runs over. The default: nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsChannel {
    /// The channel binding `tls-exporter` (RFC 9266); `None`: not TLS 1.3.
    pub exporter: Option<[u8; 32]>,
    /// The certificate that the TLS client has shown because the TLS server asked for one, and whose key it has.
    pub client_certificate: Option<CertificateDigests>,
}

/// The SHA-256 digests of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CertificateDigests {
    /// Of its DER form.
    pub certificate: [u8; 32],
    /// Of the DER form of its SubjectPublicKeyInfo.
    pub key: [u8; 32],
}
