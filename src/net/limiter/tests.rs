//! Tests of the limiter, with the time as a parameter. `ms`: milliseconds since the begin of a test.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;

use super::*;

struct Crowd {
    limiter: ConnectionLimiter,
    /// The other end of all connections: there may be fewer descriptors than connections.
    socket: Arc<OwnedFd>,
    client: UnixStream,
    begun: Instant,
    next: u32,
}

struct Member {
    permit: ConnectionPermit,
}

impl Member {
    fn is_displaced(&self) -> bool {
        self.permit.accepted.is_displaced()
    }

    fn count_displaced(members: &[Member]) -> usize {
        members.iter().filter(|member| member.is_displaced()).count()
    }
}

impl Crowd {
    fn new(all: usize, each: usize) -> Crowd {
        let limits = ConnectionLimits { all, each, patience: Duration::from_secs(300) };
        let (ours, client) = UnixStream::pair().unwrap();
        for end in [&ours, &client] {
            end.set_nonblocking(true).unwrap();
        }
        let (limiter, socket) = (ConnectionLimiter::new(limits), Arc::new(ours.into()));
        Crowd { limiter, socket, client, begun: Instant::now(), next: 0 }
    }

    fn at(&self, ms: u64) -> Instant {
        self.begun + Duration::from_millis(ms)
    }

    fn admit_from(&self, peer: &str, known: Option<bool>, ms: u64) -> Result<Member, NotAdmitted> {
        let permit = self.limiter.admit("test", &self.socket, peer.parse().unwrap(), known, self.at(ms))?;
        Ok(Member { permit })
    }

    /// Admits a connection from a new address.
    fn admit(&mut self, known: Option<bool>, ms: u64) -> Result<Member, NotAdmitted> {
        self.next += 1;
        self.admit_from(&IpAddr::from(self.next.to_be_bytes()).to_string(), known, ms)
    }

    /// Reads as the thread of a displaced connection does.
    fn read(&self) -> io::Result<usize> {
        UnixStream::from(self.socket.try_clone().unwrap()).read(&mut [0])
    }

    fn fill(&mut self, count: usize, known: Option<bool>, ms: u64) -> Vec<Member> {
        (0..count).map(|_| self.admit(known, ms).unwrap()).collect()
    }
}

#[test]
fn one_client_has_a_limit_and_displaces_none_of_its_connections() {
    let crowd = Crowd::new(100, 2);
    for (client, same, other) in
        [("192.0.2.1", "192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::ffff:0:1", "2001:db8:0:1::1")]
    {
        let first = [client, same].map(|peer| crowd.admit_from(peer, None, 0).unwrap());
        assert_eq!(crowd.admit_from(same, None, 1_000_000).err(), Some(NotAdmitted::TooManyOfClient));
        let _other = crowd.admit_from(other, None, 0).unwrap();
        assert_eq!(Member::count_displaced(&first), 0);
        drop(first);
        assert!(crowd.admit_from(same, None, 0).is_ok());
    }
}

#[test]
fn a_full_listener_displaces_the_untrusted_connection_whose_command_is_oldest() {
    let mut crowd = Crowd::new(4, 4);
    let members = crowd.fill(4, None, 0);
    assert_eq!(crowd.read().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    for (member, ms) in members.iter().zip([40, 10, 30, 20]) {
        member.permit.accepted.note_command(crowd.at(ms));
    }
    // The oldest has authenticated.
    members[1].permit.accepted.trust();
    let (mut displaced, mut kept) = (Vec::new(), Vec::new());
    for (ms, oldest) in [(100, 3), (101, 2), (102, 0)] {
        kept.push(crowd.admit(None, ms).unwrap());
        displaced.push(oldest);
        displaced.sort_unstable();
        let found: Vec<_> = (0..4).filter(|at| members[*at].is_displaced()).collect();
        assert_eq!(found, displaced);
    }
    // A displaced connection cannot become trusted, and its thread reads the end of the input.
    members[3].permit.accepted.trust();
    assert!(members[3].is_displaced());
    assert!(!kept.iter().any(Member::is_displaced));
    assert_eq!(crowd.read().unwrap(), 0);
    // A trusted connection is never displaced.
    kept.iter().for_each(|member| member.permit.accepted.trust());
    assert_eq!(crowd.admit(None, 10_000_000).err(), Some(NotAdmitted::Full));
    // A displaced connection has no place, also before its thread has ended.
    drop(members);
    assert!(crowd.admit(None, 10_000_000).is_ok());
}

#[test]
fn after_trust_has_ended_the_commands_are_counted_anew() {
    let mut crowd = Crowd::new(2, 2);
    let members = crowd.fill(2, None, 0);
    let [first, second] = [0, 1].map(|at| &members[at].permit.accepted);
    (0..20).for_each(|ms| first.note_command(crowd.at(ms)));
    first.trust();
    second.note_command(crowd.at(40));
    first.distrust(crowd.at(30));
    // It was not trusted before.
    second.distrust(crowd.at(0));
    first.note_command(crowd.at(50));
    let _newcomer = crowd.admit(None, 60).unwrap();
    assert!(!members[0].is_displaced() && members[1].is_displaced());
    second.distrust(crowd.at(70));
    assert!(members[1].is_displaced());
}

#[test]
fn patience_shrinks_if_fewer_than_a_quarter_of_the_places_are_free() {
    // 250 free places are a quarter: 300 s of patience; at none 5 s.
    for (present, ms, displaced) in [
        (700, 100_000_000, 0),
        (749, 301_000, 0),
        (750, 299_000, 0),
        (750, 301_000, 1),
        // Until enough places are free that the patience is long enough.
        (900, 151_000, 24),
        (900, 301_000, 151),
        (999, 5_000, 0),
        (999, 7_000, 1),
        (1000, 0, 1),
        (1000, 4_000, 1),
        (1000, 9_000, 4),
    ] {
        let mut crowd = Crowd::new(1000, 1);
        let members = crowd.fill(present, None, 0);
        let _newcomer = crowd.admit(None, ms).unwrap();
        assert_eq!(Member::count_displaced(&members), displaced, "{present} after {ms} ms");
    }
}

#[test]
fn a_client_that_repeats_commands_becomes_old() {
    let mut crowd = Crowd::new(2, 2);
    let members = crowd.fill(2, None, 0);
    (1..=COUNTED_COMMANDS as u64).for_each(|ms| members[0].permit.accepted.note_command(crowd.at(ms)));
    members[0].permit.accepted.note_command(crowd.at(500));
    members[1].permit.accepted.note_command(crowd.at(100));
    let _newcomer = crowd.admit(None, 600).unwrap();
    assert!(members[0].is_displaced() && !members[1].is_displaced());
}

#[test]
fn an_eighth_of_the_places_is_reserved_for_known_networks() {
    let (mut crowd, unknown, customer) = (Crowd::new(80, 1), Some(false), Some(true));
    let mut unknown_clients = crowd.fill(70, unknown, 0);
    // Unknown networks have seven eighths, and displace each other's connections.
    unknown_clients.push(crowd.admit(unknown, 10).unwrap());
    assert_eq!(Member::count_displaced(&unknown_clients), 1);
    let mut customers = crowd.fill(10, customer, 20);
    assert_eq!(Member::count_displaced(&unknown_clients), 1);
    unknown_clients.push(crowd.admit(unknown, 30).unwrap());
    assert_eq!((Member::count_displaced(&unknown_clients), Member::count_displaced(&customers)), (2, 0));
    // More connections from known networks displace those of unknown ones, even new ones.
    customers.push(crowd.admit(customer, 40).unwrap());
    assert_eq!((Member::count_displaced(&unknown_clients), Member::count_displaced(&customers)), (3, 0));
    // Beyond the eighth, the untrusted connections of known networks are displaced like all others.
    unknown_clients.iter().filter(|member| !member.is_displaced()).for_each(|member| member.permit.accepted.trust());
    unknown_clients.push(crowd.admit(unknown, 50).unwrap());
    assert_eq!(Member::count_displaced(&customers), 1);
    // In the eighth, connections of known networks are displaced only by those of known networks.
    unknown_clients.push(crowd.admit(unknown, 51).unwrap());
    assert!(unknown_clients[unknown_clients.len() - 2].is_displaced() && Member::count_displaced(&customers) == 1);
    unknown_clients.last().unwrap().permit.accepted.trust();
    assert_eq!(crowd.admit(unknown, 52).err(), Some(NotAdmitted::Full));
    customers.push(crowd.admit(customer, 53).unwrap());
    assert_eq!(Member::count_displaced(&customers), 2);
}

#[test]
fn displaced_connections_that_do_not_end_are_cut_and_their_number_has_a_limit() {
    let mut crowd = Crowd::new(16, 1);
    let mut members = crowd.fill(16, None, 0);
    let is_cut = |member: &Member| member.permit.accepted.state.load(Ordering::SeqCst) == CUT;
    members.push(crowd.admit(None, 1).unwrap());
    members.push(crowd.admit(None, 2).unwrap());
    assert!(!is_cut(&members[0]));
    assert_eq!(crowd.client.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    // The first two have not ended in time.
    members.push(crowd.admit(None, 10_500).unwrap());
    assert!(is_cut(&members[0]) && is_cut(&members[1]));
    assert_eq!(crowd.client.read(&mut [0]).unwrap(), 0);
    // If there are many, they are cut at once.
    let mut before = members.len();
    while let Ok(member) = crowd.admit(None, 10_600) {
        members.push(member);
    }
    assert_eq!(Member::count_displaced(&members), FEWEST_ENDING);
    assert!(members.len() > before && members.iter().filter(|member| is_cut(member)).count() > FEWEST_ENDING / 2);
    before = members.len();
    members.retain(|member| !member.is_displaced());
    assert_eq!(before - members.len(), FEWEST_ENDING);
    assert!(crowd.admit(None, 10_700).is_ok());
}

#[test]
fn without_descriptors_silent_untrusted_connections_are_displaced() {
    let mut crowd = Crowd::new(100, 1);
    let mut members = crowd.fill(2, Some(true), 0);
    members.extend(crowd.fill(5, Some(false), 0));
    members[2].permit.accepted.trust();
    members[3].permit.accepted.note_command(crowd.at(5_500));
    let displaced = |crowd: &Crowd, members: &[Member], ms| {
        crowd.limiter.relieve(crowd.at(ms));
        members.iter().map(|member| if member.is_displaced() { 'x' } else { '.' }).collect::<String>()
    };
    assert_eq!(displaced(&crowd, &members, 4_000), ".......");
    assert_eq!(displaced(&crowd, &members, 6_000), "....xxx");
    assert_eq!(displaced(&crowd, &members, 6_001), "x...xxx");
    assert_eq!(displaced(&crowd, &members, 11_000), "x..xxxx");
    // Connections from known networks come last, and trusted ones stay.
    assert_eq!(displaced(&crowd, &members, 60_001), "xx.xxxx");
    assert_eq!(displaced(&crowd, &members, 60_002), "xx.xxxx");
}

#[test]
fn lower_limits_take_effect_with_the_next_connection() {
    let mut crowd = Crowd::new(100, 1);
    let members = crowd.fill(40, None, 0);
    crowd.limiter.set_limits(ConnectionLimits { all: 1, each: 1, patience: Duration::from_secs(1) });
    assert_eq!(crowd.admit(None, 1).err(), Some(NotAdmitted::Full));
    assert_eq!(Member::count_displaced(&members), FEWEST_ENDING);
}

#[test]
fn the_connections_of_each_listener_are_counted_separately() {
    let crowd = Crowd::new(1, 1);
    let (socket, peer) = (UnixStream::pair().unwrap().0, "192.0.2.1".parse().unwrap());
    let socket = Arc::new(socket.into());
    let admit = |listener| crowd.limiter.admit(listener, &socket, peer, None, crowd.begun);
    let _permits = [admit("inbound").unwrap(), admit("odmr").unwrap()];
    assert_eq!(admit("odmr").err(), Some(NotAdmitted::TooManyOfClient));
}

/// Otherwise a client that connects again and again could fill the disk with lines of the log.
#[test]
fn rejected_connections_of_a_client_are_logged_once_a_minute() {
    let crowd = Crowd::new(1, 1);
    let may_log = |listener, peer: &str, second: u64| {
        crowd.limiter.may_log(listener, peer.parse().unwrap(), crowd.at(second * 1000))
    };
    let same = [("2001:db8::1", 0), ("2001:db8::2", 1), ("2001:db8::1", 59), ("2001:db8::1", 60)];
    assert_eq!(same.map(|(peer, second)| may_log("odmr", peer, second)), [Some(0), None, None, Some(2)]);
    assert_eq!([may_log("inbound", "2001:db8::1", 60), may_log("odmr", "2001:db8:0:1::1", 60)], [Some(0); 2]);
    // Nor can many clients.
    let clients = (0..200).filter(|n| may_log("odmr", &format!("192.0.2.{n}"), 61).is_some());
    assert_eq!(clients.count(), LOGGED_LIMIT - 3);
}
