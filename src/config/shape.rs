//! Values that may be written alone, or several of them in a list or a table.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{DeserializeOwned, Error, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Spanned;

/// A value, or several of them.
pub(super) enum OneOrMany<M: Many> {
    One(Box<M::One>),
    Many(M),
}

/// How several values are written.
pub(super) trait Many: DeserializeOwned {
    type One: DeserializeOwned;
    /// What it should be, for the error about another shape.
    const EXPECTED: &'static str;
    /// How one value is written.
    const ONE: Shape;
    /// How several are written, unlike one.
    const MANY: Shape;
}

pub(super) enum Shape {
    Text,
    List,
    Table,
}

/// Each value with its place in the file.
pub(super) fn each<T>(written: Spanned<OneOrMany<Vec<Spanned<T>>>>) -> Vec<Spanned<T>>
where
    Vec<Spanned<T>>: Many<One = T>,
{
    let span = written.span();
    match written.into_inner() {
        OneOrMany::One(one) => vec![Spanned::new(span, *one)],
        OneOrMany::Many(many) => many,
    }
}

impl<'de, M: Many> Deserialize<'de> for OneOrMany<M> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<OneOrMany<M>, D::Error> {
        deserializer.deserialize_any(ShapeVisitor(PhantomData))
    }
}

struct ShapeVisitor<M>(PhantomData<M>);

impl<'de, M: Many> Visitor<'de> for ShapeVisitor<M> {
    type Value = OneOrMany<M>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(M::EXPECTED)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<OneOrMany<M>, E> {
        match M::ONE {
            Shape::Text => M::One::deserialize(text.into_deserializer()).map(|one| OneOrMany::One(Box::new(one))),
            _ => Err(E::invalid_type(Unexpected::Str(text), &self)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<OneOrMany<M>, A::Error> {
        match M::MANY {
            Shape::List => M::deserialize(SeqAccessDeserializer::new(list)).map(OneOrMany::Many),
            _ => Err(A::Error::invalid_type(Unexpected::Seq, &self)),
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<OneOrMany<M>, A::Error> {
        let table = MapAccessDeserializer::new(table);
        match (M::ONE, M::MANY) {
            (Shape::Table, _) => M::One::deserialize(table).map(|one| OneOrMany::One(Box::new(one))),
            (_, Shape::Table) => M::deserialize(table).map(OneOrMany::Many),
            _ => Err(A::Error::invalid_type(Unexpected::Map, &self)),
        }
    }
}
