//! One counter of the 8254, as a function of time.

pub(super) mod persist;

/// Whether the counting element counts. Ticks are those of the chip's clock since guest time 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// No count was written since the control word, or the gate has not triggered it.
    Idle,
    /// Counting since this tick.
    Since(u64),
    /// Held by the gate after this many ticks.
    Held(u64),
}

/// Which bytes of a count the processor transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bytes {
    Low,
    High,
    Both,
}

/// The state of one counter.
#[derive(Clone, Debug)]
pub(super) struct Channel {
    mode: u8,
    bytes: Bytes,
    bcd: bool,
    gate: bool,
    run: Run,
    /// The count in force, 1-65536.
    reload: u32,
    /// A count that waits, and the tick at which it comes into force; `u64::MAX` for the next trigger.
    next: Option<(u64, u32)>,
    /// A count was written since the control word.
    written: bool,
    /// Low byte of a count whose high byte is still to be written.
    low: Option<u8>,
    /// The next read gives the high byte.
    high_next: bool,
    /// Latched count, with how many bytes of it are still to be read.
    latch: Option<(u16, u8)>,
    status: Option<u8>,
}

impl Channel {
    pub(super) fn new(gate: bool) -> Channel {
        Channel {
            mode: 0,
            bytes: Bytes::Both,
            bcd: false,
            gate,
            run: Run::Idle,
            reload: 0x1_0000,
            next: None,
            written: false,
            low: None,
            high_next: false,
            latch: None,
            status: None,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn is_triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Ticks since the count was loaded.
    fn elapsed(&self, now: u64) -> Option<u64> {
        match self.run {
            Run::Idle => None,
            Run::Since(start) => Some(now.saturating_sub(start)),
            Run::Held(elapsed) => Some(elapsed),
        }
    }

    /// Brings a waiting count into force if its time has come.
    fn settle(&mut self, now: u64) {
        if let Some((at, count)) = self.next
            && at <= now
        {
            self.next = None;
            self.reload = count;
            self.run = Run::Since(at);
        }
    }

    /// A control word that is not a read-back command.
    pub(super) fn control(&mut self, value: u8, now: u64) {
        let bytes = match value >> 4 & 3 {
            0 => return self.latch_count(now),
            1 => Bytes::Low,
            2 => Bytes::High,
            _ => Bytes::Both,
        };
        let mode = value >> 1 & 7;
        *self = Channel {
            mode: if mode > 5 { mode - 4 } else { mode },
            bytes,
            bcd: value & 1 != 0,
            reload: self.reload,
            ..Channel::new(self.gate)
        };
    }

    /// A read-back command that names this counter.
    pub(super) fn read_back(&mut self, count: bool, status: bool, now: u64) {
        if count {
            self.latch_count(now);
        }
        if status && self.status.is_none() {
            self.settle(now);
            let null = !self.written || self.next.is_some();
            let bytes = match self.bytes {
                Bytes::Low => 1,
                Bytes::High => 2,
                Bytes::Both => 3,
            };
            self.status = Some(
                u8::from(self.output(now)) << 7
                    | u8::from(null) << 6
                    | bytes << 4
                    | self.mode << 1
                    | u8::from(self.bcd),
            );
        }
    }

    fn latch_count(&mut self, now: u64) {
        if self.latch.is_none() {
            let bytes = if self.bytes == Bytes::Both { 2 } else { 1 };
            self.latch = Some((self.count(now), bytes));
            self.high_next = self.bytes == Bytes::High;
        }
    }

    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let value = match self.latch {
            Some((value, left)) => {
                self.latch = (left > 1).then_some((value, left - 1));
                value
            }
            None => self.count(now),
        };
        let high = match self.bytes {
            Bytes::Low => false,
            Bytes::High => true,
            Bytes::Both => {
                self.high_next = !self.high_next;
                !self.high_next
            }
        };
        value.to_le_bytes()[usize::from(high)]
    }

    pub(super) fn write(&mut self, value: u8, now: u64) {
        let raw = match (self.bytes, self.low.take()) {
            (Bytes::Low, _) => value.into(),
            (Bytes::High, _) => u16::from(value) << 8,
            (Bytes::Both, Some(low)) => u16::from_le_bytes([low, value]),
            (Bytes::Both, None) => {
                self.low = Some(value);
                if self.mode == 0 {
                    self.run = Run::Idle; // the first byte stops the count
                }
                return;
            }
        };
        self.settle(now);
        let count = self.decode(raw);
        self.written = true;
        if self.is_triggered() {
            self.next = Some((u64::MAX, count));
        } else if let (true, Run::Since(start)) = (self.is_periodic(), self.run) {
            // The running period is finished first.
            let periods = now.saturating_sub(start) / u64::from(self.reload) + 1;
            self.next = Some((start + periods * u64::from(self.reload), count));
        } else {
            self.reload = count;
            self.run = match (self.gate, self.is_periodic()) {
                (true, _) => Run::Since(now),
                (false, true) => Run::Idle,
                (false, false) => Run::Held(0),
            };
        }
    }

    pub(super) fn set_gate(&mut self, gate: bool, now: u64) {
        self.settle(now);
        let rose = gate && !self.gate;
        let fell = !gate && self.gate;
        self.gate = gate;
        match self.mode {
            0 | 4 => match self.run {
                Run::Since(start) if fell => self.run = Run::Held(now.saturating_sub(start)),
                Run::Held(elapsed) if rose => self.run = Run::Since(now.saturating_sub(elapsed)),
                _ => {}
            },
            _ if rose && self.written => {
                if let Some((_, count)) = self.next.take() {
                    self.reload = count;
                }
                self.run = Run::Since(now);
            }
            2 | 3 if fell => {
                if let Some((_, count)) = self.next.take() {
                    self.reload = count;
                }
                self.run = Run::Idle;
            }
            _ => {}
        }
    }

    /// Level of the output pin.
    pub(super) fn output(&self, now: u64) -> bool {
        let mut this = self.clone();
        this.settle(now);
        let reload = u64::from(this.reload);
        match (this.mode, this.elapsed(now)) {
            (0, elapsed) => elapsed.is_some_and(|elapsed| elapsed >= reload),
            (_, None) => true,
            (1, Some(elapsed)) => elapsed >= reload,
            (2, Some(elapsed)) => elapsed % reload != reload - 1,
            (3, Some(elapsed)) => elapsed % reload < reload.div_ceil(2),
            (_, Some(elapsed)) => elapsed != reload,
        }
    }

    /// The rising edges of the output after `now`, as the tick of the first and the ticks from one to the
    /// next, if there are more.
    pub(super) fn rises(&self, now: u64) -> Option<(u64, Option<u64>)> {
        let mut this = self.clone();
        this.settle(now);
        let (Run::Since(start), reload) = (this.run, u64::from(this.reload)) else {
            return None;
        };
        if this.is_periodic() {
            // A count that waits comes into force at an edge.
            if let Some((at, count)) = this.next.filter(|next| next.0 != u64::MAX) {
                return Some((at, Some(count.into())));
            }
            return Some((start + (now.saturating_sub(start) / reload + 1) * reload, Some(reload)));
        }
        let at = if this.mode <= 1 { start + reload } else { start + reload + 1 };
        (at > now).then_some((at, None))
    }

    /// The counting element as the processor reads it.
    fn count(&self, now: u64) -> u16 {
        let mut this = self.clone();
        this.settle(now);
        let modulus = if this.bcd { 10_000 } else { 0x1_0000 };
        let reload = u64::from(this.reload);
        let elapsed = this.elapsed(now).unwrap_or(0);
        let count = match this.mode {
            2 => reload - elapsed % reload,
            3 => (reload & !1).max(2) - 2 * (elapsed % reload.div_ceil(2).max(1)).min(reload / 2),
            _ => (reload + modulus - elapsed % modulus) % modulus,
        };
        self.encode((count % modulus) as u16)
    }

    /// A count as written; 0 is the largest. The periodic modes cannot count from 1.
    fn decode(&self, raw: u16) -> u32 {
        let (count, all) = if self.bcd {
            let digit = |at: u16| u32::from(raw >> (4 * at) & 15);
            (digit(3) * 1000 + digit(2) * 100 + digit(1) * 10 + digit(0), 10_000)
        } else {
            (raw.into(), 0x1_0000)
        };
        match count {
            0 => all,
            1 if self.is_periodic() => 2,
            _ => count.min(all),
        }
    }

    fn encode(&self, count: u16) -> u16 {
        if !self.bcd {
            return count;
        }
        let digit = |unit: u16| count / unit % 10;
        (digit(1000) << 12) | (digit(100) << 8) | (digit(10) << 4) | digit(1)
    }

    pub(super) fn inspect(&self, now: u64) -> String {
        format!("{self:x?}, count {:#x}, output {}", self.count(now), self.output(now))
    }
}
