//! Clients that mean no good.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use super::{Answer, Case, ECHOES, SLEEPS, shared};
use crate::router::MAX_BODY;
use crate::server::{CONNECTIONS, STREAMS};

#[test]
fn what_is_wrong_is_answered_with_what_is_wrong() {
    let machine = Case::new(SLEEPS, "1");
    let answer = machine.ask("DELETE", "/info", "", b"");
    assert_eq!(answer.error(), (405, "/info takes GET, not DELETE".into()));
    assert!(answer.head.contains("allow: get"), "{answer:?}");
    assert_eq!(machine.get("/nothing").error().0, 404);
    assert_eq!(machine.get("/").error().0, 404);
    assert_eq!(machine.ask("GET", "/info", "", b"x").error(), (400, "GET /info takes no body".into()));
    let form = machine.ask(
        "POST",
        "/resume",
        "Content-Type: application/x-www-form-urlencoded\r\n",
        b"clock=freeze",
    );
    assert_eq!(
        form.error(),
        (415, "/resume takes application/json, not application/x-www-form-urlencoded".into())
    );
    let large = machine.post("/resume", &format!("{{\"clock\":\"{}\"}}", "x".repeat(MAX_BODY)));
    assert_eq!(large.error(), (413, format!("The body is too large: {MAX_BODY} bytes are possible")));
    let deep = machine.post("/nmi", &"[".repeat(10_000));
    assert!(deep.error().1.contains("makes no sense"), "{deep:?}");
    let plain = machine.post("/nmi", "{\"vcpu\":18446744073709551616}");
    assert_eq!(plain.error().0, 400);
    let upgrade = machine.ask("GET", "/console", "Upgrade: websocket\r\n", b"");
    assert_eq!(upgrade.error(), (400, "Can upgrade to wardian-console, not to websocket".into()));
    // Heads that are no heads are answered by the library.
    let long = format!("GET /info HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(20_000));
    assert_eq!(Answer::parse(&machine.raw(long.as_bytes())).status, 431);
    let many = format!("GET /info HTTP/1.1\r\nHost: x\r\n{}\r\n", "X: y\r\n".repeat(200));
    assert_eq!(Answer::parse(&machine.raw(many.as_bytes())).status, 431);
    assert_eq!(Answer::parse(&machine.raw(b"GET /info HTTP/9.9\r\n\r\n")).status, 400);
    let both = b"POST /nmi HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc";
    assert_eq!(Answer::parse(&machine.raw(both)).status, 400);
    assert_eq!(machine.get("/info").status, 200);
    machine.end();
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below.max(1)
    }
}

#[test]
fn whatever_is_sent_the_machine_answers_the_next() {
    let machine = Case::new(ECHOES, "1");
    let seeds: [&[u8]; 6] = [
        b"GET /info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"POST /resume HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n{\"clock\":\"freeze\"}",
        b"POST /console HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"GET /console?past=10 HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: wardian-console\r\n\r\nhello",
        b"GET /events?follow=false&past=3 HTTP/1.1\r\nHost: x\r\n\r\nGET /vcpus/0 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /inspect/devices%2fserial HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n",
    ];
    let mut random = Random(0x5eed_1234_5678_9abc);
    let (mut answered, mut good) = (0, 0);
    for round in 0..400 {
        let mut bytes = seeds[round % seeds.len()].to_vec();
        for _ in 0..random.next(4) {
            let at = random.next(bytes.len());
            match random.next(6) {
                0 => bytes.truncate(at),
                1 => bytes[at] = random.next(256) as u8,
                2 => bytes.insert(at, random.next(256) as u8),
                3 => drop(bytes.remove(at)),
                4 => {
                    let piece = bytes[at..].to_vec();
                    bytes.extend(piece);
                }
                _ => bytes.extend(std::iter::repeat_n(b'A', random.next(40_000))),
            }
            if bytes.is_empty() {
                bytes.push(b'\n');
            }
        }
        let answer = machine.raw(&bytes);
        assert!(
            answer.is_empty() || answer.starts_with(b"HTTP/1.1 "),
            "{:?}",
            String::from_utf8_lossy(&answer)
        );
        answered += usize::from(!answer.is_empty());
        good += usize::from(answer.starts_with(b"HTTP/1.1 200"));
    }
    assert!(answered > 200 && good > 50 && good < answered, "{good} good of {answered} answers");
    assert_eq!(machine.get("/info").status, 200);
    machine.end();
}

#[test]
fn many_call_at_once() {
    let machine = shared(SLEEPS, "2");
    let threads: Vec<_> = (0..8usize)
        .map(|n| {
            let machine = Arc::clone(&machine);
            std::thread::spawn(move || {
                for round in 0..12 {
                    let status = match (n + round) % 6 {
                        0 => machine.post("/pause", "").status,
                        1 => machine.post("/resume", "").status,
                        2 => machine.get("/vcpus").status,
                        3 => machine.get("/inspect/vcpus").status,
                        4 => machine.get("/metrics").status,
                        _ => machine.get("/info").status,
                    };
                    assert_eq!(status, 200);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(machine.post("/resume", "").json()["status"], "running");
    Arc::into_inner(machine).unwrap().end();
}

#[test]
fn there_are_so_many_connections_and_no_more() {
    let machine = Case::new(SLEEPS, "1");
    let listen = b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n";
    let open = |bytes: &[u8]| {
        let mut stream = machine.connect();
        stream.write_all(bytes).unwrap();
        stream
    };
    let streams: Vec<_> = (0..STREAMS).map(|_| open(listen)).collect();
    // One more than may listen is refused, but there is still room to ask.
    super::until("all listen", || {
        machine.get("/wait").error() == (503, "Too many clients listen already".into())
    });
    assert_eq!(machine.get("/info").status, 200);
    // Clients that say nothing fill the rest.
    let idle: Vec<_> = (STREAMS..CONNECTIONS).map(|_| open(b"")).collect();
    super::until("it is full", || machine.raw(b"").starts_with(b"HTTP/1.1 503"));
    drop(idle);
    super::until("there is room again", || {
        machine.raw(b"GET /info HTTP/1.0\r\n\r\n").starts_with(b"HTTP/1.0 200")
    });
    machine.control.end();
    for mut stream in streams {
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!(Answer::parse(&answer).json()["status"], 12);
    }
    machine.end();
}

#[test]
fn who_does_not_read_holds_up_nobody() {
    let machine = Case::new(SLEEPS, "1");
    let mut sloth = machine.connect();
    sloth.write_all(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    // Far more than socket buffers and rings hold.
    for _ in 0..4000 {
        drop(machine.control.pause().unwrap());
    }
    assert_eq!(machine.get("/info").status, 200);
    sloth.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let (mut read, mut bytes) = (Vec::new(), [0; 65536]);
    while let Ok(count @ 1..) = sloth.read(&mut bytes) {
        read.extend_from_slice(&bytes[..count]);
        if String::from_utf8_lossy(&read).contains("\"event\":\"lost\"") {
            machine.end();
            return;
        }
    }
    panic!("{} bytes, and nothing was lost", read.len());
}
