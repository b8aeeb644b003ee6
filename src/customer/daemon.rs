//! `odmr pull --daemon`: a call every so often, and meanwhile a listener for the mail of this host's users.
//!
//! The first call is made at once; the next begins `schedule.every` after the last one began, or right behind it when
//! it took longer. A call that fails is no reason to end: the next one may do better. It waits for events only: the
//! word to stop, the time of the next call, a connection.

use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::local;
use super::outbox::Outbox;
use super::pull::{Caller, Error};
use crate::config::Customer;
use crate::listen::{self, Gate, Visitors};
use crate::session::literal;
use crate::smtp::reply::Reply;
use crate::stamp::Stamps;
use crate::wire::{Stop, Trace, Wire};

/// The name of the listener, in the log.
const LISTENER: &str = "local";

/// How long one who is turned away may take to read why.
const FAREWELL: Duration = Duration::from_secs(5);

/// Runs until it is told to stop.
pub fn run(config: &Customer, stamps: &Stamps, stop: &Stop) -> Result<(), Error> {
    let caller = Caller::new(config, stamps)?;
    let listeners = match caller.outbox() {
        Some(outbox) => Listeners::start(config, outbox, stop)?,
        None => Listeners::default(),
    };
    while !stop.stopped() {
        let begun = Instant::now();
        match caller.pull(stop) {
            Ok(summary) => log::info!("event=pulled summary={:?}", summary.to_string()),
            Err(_) if stop.stopped() => break,
            Err(error) => log::warn!("event=call-failed error={:?}", error.to_string()),
        }
        stop.wait_until(Some(begun + config.providers[0].schedule.every));
    }
    listeners.close(config.timeouts.shutdown);
    Ok(())
}

/// The listeners of `[outgoing]`, a thread each.
#[derive(Default)]
struct Listeners {
    threads: Vec<JoinHandle<()>>,
    visitors: Option<Visitors>,
    halt: Option<Stop>,
}

impl Listeners {
    /// Binds all of them, and only then begins to serve.
    fn start(config: &Customer, outbox: &Arc<Outbox>, stop: &Stop) -> Result<Listeners, Error> {
        let system = |error: std::io::Error| Error::System(error.to_string());
        let bound: Result<Vec<TcpListener>, String> =
            outbox.config().listen.iter().map(|address| listen::bind(*address)).collect();
        let visitors = Visitors::new(config.limits.connections, config.limits.connections_per_address);
        let halt = Stop::new().map_err(system)?;
        let mut threads = Vec::new();
        for listener in bound.map_err(Error::System)? {
            log::info!("listening {LISTENER} {}", listener.local_addr().map_err(system)?);
            let gate = Gate { name: LISTENER, greets: true, stop: stop.clone(), visitors: visitors.clone() };
            let door = Door { config: config.clone(), outbox: outbox.clone(), stop: stop.clone(), halt: halt.clone() };
            let work = move || gate.accept(&listener, Arc::new(move |stream, peer| door.serve(stream, peer)));
            threads.push(std::thread::Builder::new().name(LISTENER.to_owned()).spawn(work).map_err(system)?);
        }
        Ok(Listeners { threads, visitors: Some(visitors), halt: Some(halt) })
    }

    /// Sessions come to a good end, or to an end, within that time. The word to stop has been said.
    fn close(self, patience: Duration) {
        for thread in self.threads {
            let _ = thread.join();
        }
        if let (Some(visitors), Some(halt)) = (self.visitors, self.halt) {
            visitors.wait_until_gone(Instant::now() + patience);
            halt.stop();
            visitors.wait_until_gone(Instant::now() + Duration::from_secs(1));
        }
    }
}

/// Behind it one connection is served.
struct Door {
    config: Customer,
    outbox: Arc<Outbox>,
    stop: Stop,
    halt: Stop,
}

impl Door {
    fn serve(&self, stream: TcpStream, peer: IpAddr) {
        let trace = Trace { id: format!("{LISTENER}-{peer}"), us: 'S', them: 'C' };
        let peer_name = literal(peer);
        let wire = match Wire::new(OwnedFd::from(stream), trace) {
            Ok(wire) => wire,
            Err(error) => return log::warn!("event=no-session peer={peer_name} error={:?}", error.to_string()),
        };
        let why = match self.outbox.config().admits(peer) {
            true => local::serve(&self.config, &self.outbox, wire, peer_name.clone(), &self.stop, &self.halt),
            false => turn_away(wire),
        };
        log::info!("event=closed listener={LISTENER} peer={peer_name} reason={why:?}");
    }
}

/// RFC 5321 section 3.1: a server that gives no service says so with 554 in place of its greeting.
fn turn_away(mut wire: Wire) -> String {
    let mut octets = Vec::new();
    Reply::new(554, "5.7.1", "This server is for its own network only").write_to(&mut octets);
    wire.trace.said(octets.trim_ascii_end());
    wire.say(&octets);
    let _ = wire.flush_all(Instant::now() + FAREWELL);
    wire.shutdown();
    "not one of our networks".to_owned()
}
