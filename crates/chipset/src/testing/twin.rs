//! What is expected of everything that is saved: a device and the one restored from its saved state answer alike,
//! hostile states are refused or harmless, and what version 1 wrote is read for ever.

use std::fmt::Debug;
use std::path::PathBuf;

use serde_json::Value;
use wardian_state::{Record, Refused};

use super::Clock;
use wardian_time::Nanos;

/// A small generator (splitmix64), the same on every run.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// Less than `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True once in `times`.
    pub(crate) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A span of time, mostly short.
    pub(crate) fn span(&mut self) -> Nanos {
        let longest = self.one_of(&[
            1_000,
            1_000,
            50_000,
            50_000,
            50_000,
            1_000_000,
            1_000_000,
            20_000_000,
            300_000_000,
        ]);
        Nanos(self.below(longest))
    }
}

/// A device with all that it stands on.
pub(crate) trait Twin: Sized {
    /// What is saved of it.
    type State: Record + Clone + PartialEq + Debug;

    /// As after power-on.
    fn fresh(random: &mut Random) -> Self;
    /// From a saved state, on a clock that stands where `other`'s does.
    fn restored(other: &Self, state: &Self::State) -> Result<Self, Refused>;
    fn save(&self) -> Self::State;
    fn clock(&self) -> &Clock;
    /// Accesses it somehow: what could be seen of that.
    fn live(&self, random: &mut Random) -> String;
    /// Which interrupt inputs it holds up.
    fn raised(&self) -> Vec<u32> {
        Vec::new()
    }
}

fn read<R: Record>(text: &str) -> R {
    serde_json::from_str(text).unwrap()
}

fn live<T: Twin>(device: &T, random: &mut Random) -> String {
    let seen = device.live(random);
    if random.once_in(3) {
        device.clock().run(random.span());
    }
    format!("{seen} at {}", device.clock().base.now().0)
}

/// Random lives, each saved and restored somewhere and compared from there on: answers, interrupts, ticks, states.
pub(crate) fn lives_on<T: Twin>(seeds: u64) {
    for seed in 0..seeds {
        let mut random = Random::new(seed);
        let one = T::fresh(&mut random);
        for _ in 0..random.below(120) {
            live(&one, &mut random);
        }
        let state = one.save();
        let copy: T::State = read(&serde_json::to_string(&state).unwrap());
        assert_eq!(copy, state, "{seed}");
        let two = T::restored(&one, &copy).unwrap_or_else(|e| panic!("{seed}: {e}"));
        assert_eq!(two.save(), state, "seed {seed}: saved again");
        assert_eq!(two.raised(), one.raised(), "seed {seed}: lines");
        let mut same = random.clone();
        for step in 0..80 {
            let seen = live(&one, &mut random);
            assert_eq!(live(&two, &mut same), seen, "seed {seed}, step {step}");
        }
        assert_eq!(two.save(), one.save(), "seed {seed}: in the end");
    }
}

/// Every leaf of `value`, by its path.
fn leaves(value: &Value, path: &mut Vec<String>, out: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                path.push(name.replace('~', "~0").replace('/', "~1"));
                leaves(field, path, out);
                path.pop();
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                path.push(index.to_string());
                leaves(item, path, out);
                path.pop();
            }
        }
        _ => out.push(format!("/{}", path.join("/"))),
    }
}

fn hostile_value(old: &Value, random: &mut Random) -> Value {
    let numbers =
        [0, 1, 2, 7, 0x7f, 0xff, 0x100, 0xffff, 0x1_0000, 0x7fff_ffff, 0xffff_ffff, 1 << 62, u64::MAX - 1];
    match old {
        Value::Bool(on) => Value::Bool(!on),
        Value::String(text) if random.once_in(2) => Value::String(text.chars().rev().collect()),
        Value::Number(number) if random.once_in(3) => {
            let number = number.as_u64().unwrap_or(0);
            Value::from(if random.once_in(2) {
                number.wrapping_add(1)
            } else {
                number ^ 1 << random.below(64)
            })
        }
        _ if random.once_in(8) => Value::Null,
        _ if random.once_in(8) => Value::from(u64::MAX),
        _ if random.once_in(8) => Value::from(-5),
        _ => Value::from(random.one_of(&numbers)),
    }
}

/// States that somebody changed: they are refused, or the device they make neither panics nor hangs.
pub(crate) fn is_not_upset<T: Twin>(seeds: u64) {
    let (mut refused, mut taken) = (0, 0);
    for seed in 0..seeds {
        let mut random = Random::new(seed ^ 0xbad);
        let one = T::fresh(&mut random);
        for _ in 0..random.below(80) {
            live(&one, &mut random);
        }
        let saved = serde_json::to_value(one.save()).unwrap();
        let mut paths = Vec::new();
        leaves(&saved, &mut Vec::new(), &mut paths);
        for _ in 0..12 {
            let mut value = saved.clone();
            for _ in 0..random.one_of(&[1, 1, 1, 2, 5]) {
                let path = &paths[random.below(paths.len() as u64) as usize];
                if let Some(leaf) = value.pointer_mut(path) {
                    *leaf = hostile_value(leaf, &mut random);
                }
            }
            let Ok(state) = serde_json::from_value::<T::State>(value) else { continue };
            let Ok(two) = T::restored(&one, &state) else {
                refused += 1;
                continue;
            };
            taken += 1;
            for _ in 0..25 {
                live(&two, &mut random);
            }
            T::restored(&two, &two.save()).unwrap_or_else(|e| panic!("seed {seed}: what it saves: {e}"));
        }
    }
    assert!(taken > seeds / 4 && refused > seeds / 10, "{taken} taken, {refused} refused: nothing was tried");
}

/// The state of version `R::VERSION` that is kept in `testdata`, written in `examples` if it is not there yet and
/// `WARDIAN_WRITE_GOLDEN` is set.
pub(crate) fn golden<R: Record + PartialEq + Debug>(example: impl FnOnce() -> R) -> R {
    let name = format!("testdata/{}-v{}.json", R::KIND, R::VERSION);
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name);
    if !path.exists() && std::env::var_os("WARDIAN_WRITE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, serde_json::to_string_pretty(&example()).unwrap() + "\n").unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let state: R = read(&text);
    assert_eq!(
        serde_json::to_string_pretty(&state).unwrap() + "\n",
        text,
        "{}: it is written otherwise",
        path.display()
    );
    state
}

/// The state in `testdata` is restored and saved as it was. A `T` lived to its own time when it was written.
pub(crate) fn restores_golden<T: Twin>(saved_at: impl Fn(&T::State) -> u64) {
    let state = golden(|| {
        let mut random = Random::new(2026);
        let one = T::fresh(&mut random);
        for _ in 0..200 {
            live(&one, &mut random);
        }
        one.save()
    });
    let other = T::fresh(&mut Random::new(2026));
    other.clock().base.advance(Nanos(saved_at(&state)));
    let restored = T::restored(&other, &state).unwrap();
    assert_eq!(restored.save(), state);
}

/// The field that `restored` names when `state` is changed by `change`.
pub(crate) fn refusal<T: Twin>(one: &T, change: impl FnOnce(&mut T::State)) -> String {
    let mut state = one.save();
    change(&mut state);
    match T::restored(one, &state) {
        Ok(_) => "taken".to_owned(),
        Err(Refused { kind, why }) => {
            let field = why.split(':').next().unwrap_or_default();
            if kind == T::State::KIND { field.to_owned() } else { format!("{kind} {field}") }
        }
    }
}
