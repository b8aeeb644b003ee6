//! Internet messages without sockets, files or clocks (RFC 5322): addresses, address lists, the header, encoded words, and
//! the `Received` field.

pub mod address;
pub mod address_list;
pub mod encoded_word;
pub mod submitted_field;
pub mod received;
pub mod header;
