//! The console and the entropy device.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use wardian_backend::Output;
use wardian_bus::pci::Function;

use super::driver::{BUFFERS, Driver, EVENT_IDX, RAM, memory};
use crate::ConsoleInput;

#[derive(Clone, Default)]
struct Paper(Arc<Mutex<Vec<u8>>>);
impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn console() -> (Driver, ConsoleInput, Output, Paper) {
    let paper = Paper::default();
    let output = Output::new("paper", paper.clone()).unwrap();
    let mut input = None;
    let driver = Driver::new(memory(), |mem, chip| {
        let (device, typed) = crate::console(mem, chip, output.clone(), None).unwrap();
        input = Some(typed);
        device
    });
    (driver, input.unwrap(), output, paper)
}

#[test]
fn what_the_guest_prints_comes_out_in_order() {
    let (mut driver, _input, output, paper) = console();
    assert_eq!(driver.dev.name(), "virtio-console");
    driver.start(EVENT_IDX);
    driver.put(BUFFERS, b"Hello, world\n");
    assert_eq!(driver.run(1, &[(BUFFERS, 7, false), (BUFFERS + 7, 6, false)]), 0);
    assert_eq!(driver.run(1, &[(RAM - 2, 7, false)]), 0);
    driver.put(BUFFERS, &[b'x'; 10_000]);
    assert_eq!(driver.run(1, &[(BUFFERS, 10_000, false)]), 0);
    output.drain();
    let printed = paper.0.lock().unwrap();
    assert_eq!(printed[..13], *b"Hello, world\n");
    assert_eq!(printed[13..], [b'x'; 10_000]);
}

#[test]
fn what_is_typed_waits_for_buffers_and_buffers_wait_for_it() {
    let (mut driver, input, ..) = console();
    assert_eq!(input.push(b"early"), 5);
    driver.start(EVENT_IDX);
    assert_eq!(driver.run(0, &[(BUFFERS, 3, true)]), 3);
    assert_eq!(driver.run(0, &[(BUFFERS + 3, 64, true)]), 2);
    assert_eq!(driver.get(BUFFERS, 5), b"early");
    driver.offer(0, &[(BUFFERS, 64, true)]);
    driver.offer(0, &[(BUFFERS + 64, 64, true)]);
    driver.notify(0);
    assert_eq!(input.push(b"ls\r"), 3);
    assert_eq!(driver.finish(0).1, 3);
    assert_eq!(driver.get(BUFFERS, 3), b"ls\r");
    assert_eq!(driver.used(0), 0, "the second buffer waits");
    assert_eq!(input.push(&[b'y'; 100_000]), 64 * 1024, "what a sleeping guest may be owed is bounded");
    assert_eq!(driver.finish(0).1, 64);
}

#[test]
fn random_bytes_fill_what_is_asked_for_up_to_a_bound() {
    let mut driver = Driver::new(memory(), |mem, chip| crate::entropy(mem, chip, None).unwrap());
    driver.start(EVENT_IDX);
    assert_eq!(driver.run(0, &[(BUFFERS, 100, true), (BUFFERS + 200, 100, true)]), 200);
    let bytes = driver.get(BUFFERS, 300);
    assert!(bytes[..100].iter().any(|byte| *byte != 0) && bytes[200..].iter().any(|byte| *byte != 0));
    assert_eq!(bytes[100..200], [0; 100]);
    assert_eq!(driver.run(0, &[(BUFFERS, 1 << 20, true)]), 16 * 1024);
    assert_eq!(driver.run(0, &[(RAM - 10, 100, true)]), 0);
    assert_eq!(driver.run(0, &[(BUFFERS, 100, false)]), 0);
}
