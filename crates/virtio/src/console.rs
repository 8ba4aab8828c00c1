//! The console (virtio 1.2, 5.3) with one port.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wardian_backend::Output;
use wardian_memory::GuestMemory;

use crate::{Bell, Chain, OwnState, VirtioDevice};

const QUEUE_SIZE: u16 = 64;
const RECEIVE: usize = 0;
/// Typed bytes that wait for the guest at most.
const INPUT_CAPACITY: usize = 64 * 1024;
/// Bytes copied out of or into the guest at once.
const CHUNK: u64 = 4096;
/// Bytes of one request of the guest's that are printed; far more than Linux ever sends at once.
const MAX_OUTPUT: u64 = 1 << 20;

#[derive(Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    bell: Option<Bell>,
}

/// Where what the user types goes. Cheap to clone.
#[derive(Clone, Default)]
pub struct ConsoleInput(Arc<Mutex<Waiting>>);

impl ConsoleInput {
    /// The input in which what was typed waits.
    pub(crate) fn of(own: &OwnState) -> ConsoleInput {
        let input = ConsoleInput::default();
        if let OwnState::Console { typed } = own {
            input.push(typed);
        }
        input
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes bytes for the guest, as many as there is room for; returns how many. Never blocks.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut waiting = self.waiting();
        let taken = bytes.len().min(INPUT_CAPACITY - waiting.bytes.len());
        waiting.bytes.extend(&bytes[..taken]);
        let bell = waiting.bell.clone();
        drop(waiting);
        if let Some(bell) = bell {
            bell.ring();
        }
        taken
    }
}

impl std::fmt::Debug for ConsoleInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConsoleInput").field("waiting", &self.waiting().bytes.len()).finish()
    }
}

pub(crate) struct Console {
    output: Output,
    input: ConsoleInput,
}

impl Console {
    pub(crate) fn new(output: Output, input: ConsoleInput) -> Console {
        Console { output, input }
    }

    fn receive(&self, mem: &GuestMemory, chain: &Chain) -> u32 {
        let room = chain.writable.len().min(CHUNK) as usize;
        let mut waiting = self.input.waiting();
        let count = waiting.bytes.len().min(room);
        let bytes: Vec<u8> = waiting.bytes.drain(..count).collect();
        drop(waiting);
        chain.writable.write(mem, &bytes) as u32
    }

    fn transmit(&self, mem: &GuestMemory, mut chain: Chain) {
        let mut left = chain.readable.len().min(MAX_OUTPUT);
        let mut bytes = [0; CHUNK as usize];
        while left > 0 {
            let step = left.min(CHUNK);
            let Some(front) = chain.readable.take_front(step) else { return };
            if !front.read(mem, &mut bytes[..step as usize]) {
                return;
            }
            self.output.send(&bytes[..step as usize]);
            left -= step;
        }
    }
}

impl VirtioDevice for Console {
    fn name(&self) -> &str {
        "virtio-console"
    }

    fn device_type(&self) -> u16 {
        3
    }

    fn class(&self) -> u32 {
        0x07_80_00
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        // cols, rows, max_nr_ports, emerg_wr: valid only with features that are not offered.
        &[0; 12]
    }

    fn attach(&self, bells: Vec<Bell>) {
        self.input.waiting().bell = bells.into_iter().next();
    }

    fn save(&self) -> OwnState {
        OwnState::Console { typed: self.input.waiting().bytes.iter().copied().collect() }
    }

    fn ready(&self, queue: usize) -> bool {
        queue != RECEIVE || !self.input.waiting().bytes.is_empty()
    }

    fn handle(&self, queue: usize, _features: u64, mem: &GuestMemory, chain: Chain) -> u32 {
        if queue == RECEIVE {
            return self.receive(mem, &chain);
        }
        self.transmit(mem, chain);
        0
    }
}
