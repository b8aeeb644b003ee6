//! The properties of TLS that mechanisms use.

/// The properties of a TLS connection that an authentication may use. The default has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsChannel {
    /// The channel binding `tls-exporter` (RFC 9266); `None`: the connection is not TLS 1.3.
    pub exporter: Option<[u8; 32]>,
    /// The certificate that the TLS client has sent at the server's request, and whose key it has.
    pub client_certificate: Option<CertificateDigests>,
}

/// The SHA-256 digests of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CertificateDigests {
    /// The digest of its DER form.
    pub certificate: [u8; 32],
    /// The digest of the DER form of its SubjectPublicKeyInfo.
    pub key: [u8; 32],
}
