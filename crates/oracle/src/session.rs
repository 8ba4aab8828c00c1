//! [`Session`]: batches of cases through both runners, and what came of them.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::case::{CODE, CODE_BYTES, Case, Outcome, SLOTS, Scope, WINDOW, agree, describe, differences};
use crate::generate::{Generator, Options};
use crate::guest::{Guest, GuestError};
use crate::native::{Native, current};
use crate::rules;

/// What stands on the engine's side.
pub enum Subject {
    /// A guest of the engine.
    Engine(Box<Guest>),
    /// The host again, to test the test.
    Itself,
}

/// A case that did not agree.
#[derive(Debug)]
pub struct Failure {
    /// Encodings of its instructions.
    pub codes: String,
    /// Everything about it.
    pub report: String,
}

/// Counts of a run.
#[derive(Debug, Default)]
pub struct Tally {
    /// Cases that ran.
    pub cases: u64,
    /// Instructions in them.
    pub instructions: u64,
    /// Cases that ended in an exception, by vector.
    pub faults: BTreeMap<u8, u64>,
    /// Cases whose comparison means nothing, by reason.
    pub skipped: BTreeMap<&'static str, u64>,
    /// Encodings seen: how often.
    pub codes: BTreeMap<String, u64>,
    /// Failures by encoding.
    pub failed: BTreeMap<String, u64>,
    /// The first of them.
    pub failures: Vec<Failure>,
}

/// The two sides and a generator.
pub struct Session {
    generator: Generator,
    native: Native,
    subject: Subject,
    scope: Scope,
    window: Vec<u8>,
    /// Reports kept.
    pub keep: usize,
    /// Whether encodings are counted.
    pub count_codes: bool,
    /// What was seen so far.
    pub tally: Tally,
}

/// What a batch is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Single instructions.
    Single,
    /// Short sequences with jumps.
    Sequence,
}

impl Session {
    /// Sets up both sides.
    #[must_use]
    pub fn new(seed: u64, options: Options, native: Native, subject: Subject, scope: Scope) -> Session {
        Session {
            generator: Generator::new(seed, options),
            native,
            subject,
            scope,
            window: vec![0; WINDOW + 4096],
            keep: 5,
            count_codes: false,
            tally: Tally::default(),
        }
    }

    /// Replaces the generator, keeping both sides and the tally.
    pub fn generate(&mut self, seed: u64, options: Options) {
        self.generator = Generator::new(seed, options);
    }

    /// Runs one batch (a case for each code slot).
    ///
    /// # Errors
    /// When the guest's memory cannot be written. A case that the engine cannot run is a failure, not an error.
    pub fn batch(&mut self, kind: Kind) -> Result<(), GuestError> {
        let mut code = vec![0xcc; CODE_BYTES];
        let mut cases = Vec::with_capacity(SLOTS);
        for slot in 0..SLOTS {
            let case = match kind {
                Kind::Single => self.generator.single(slot),
                Kind::Sequence => self.generator.sequence(slot),
            };
            let at = (case.address - CODE) as usize;
            code[at..at + case.code.len()].copy_from_slice(&case.code);
            cases.push(case);
        }
        let mut window = std::mem::take(&mut self.window);
        self.generator.window(&mut window);
        self.native.set_code(&code, &cases);
        self.native.set_read_only(&window[WINDOW..]);
        if let Subject::Engine(guest) = &mut self.subject {
            guest.set_code(&code)?;
            guest.set_read_only(&window[WINDOW..])?;
        }
        for case in &cases {
            self.one(case, &window);
        }
        self.window = window;
        Ok(())
    }

    fn one(&mut self, case: &Case, window: &[u8]) {
        let native = self.native.run(case, window);
        let note = current(case);
        let other = match &mut self.subject {
            Subject::Engine(guest) => guest.run(case, window),
            Subject::Itself => Ok(self.native.run(case, window)),
        };
        drop(note);
        self.tally.cases += 1;
        *self.tally.faults.entry(native.fault.vector).or_default() += 1;
        if self.count_codes {
            let mark = if native.fault.vector == 6 { " #UD" } else { "" };
            for code in codes(case).into_iter().map(|code| code + mark) {
                self.tally.instructions += 1;
                *self.tally.codes.entry(code).or_default() += 1;
            }
        } else {
            self.tally.instructions += codes(case).len() as u64;
        }
        if let Some(reason) = rules::meaningless(&native) {
            *self.tally.skipped.entry(reason).or_default() += 1;
            return;
        }
        match other {
            Ok(engine) if agree(case, &native, &engine, &self.scope) => {}
            Ok(mut engine) => {
                if let Some(reason) = rules::excuse(case, &native, &mut engine) {
                    *self.tally.skipped.entry(reason).or_default() += 1;
                    if agree(case, &native, &engine, &self.scope) {
                        return;
                    }
                }
                self.fail(case, &native, &differences(case, &native, &engine, &self.scope));
            }
            Err(error) => self.fail(case, &native, &[error.to_string()]),
        }
    }

    fn fail(&mut self, case: &Case, native: &Outcome, lines: &[String]) {
        let names = codes(case).join(" ");
        *self.tally.failed.entry(names.clone()).or_default() += 1;
        if self.tally.failures.len() >= self.keep {
            return;
        }
        let mut report = describe(case, self.scope.xcr0);
        let _ = writeln!(report, "  host: {:x?} rip {:#x}", native.fault, native.rip);
        for line in lines {
            let _ = writeln!(report, "  {line}");
        }
        self.tally.failures.push(Failure { codes: names, report });
    }

    /// The engine's counters, if there is an engine.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        match &self.subject {
            Subject::Engine(guest) => guest.counters(),
            Subject::Itself => Vec::new(),
        }
    }
}

fn codes(case: &Case) -> Vec<String> {
    let mut decoder =
        iced_x86::Decoder::with_ip(case.bitness, &case.code, case.address, iced_x86::DecoderOptions::NONE);
    let mut out = Vec::new();
    while decoder.can_decode() {
        out.push(format!("{:?}", decoder.decode().code()));
    }
    out
}
