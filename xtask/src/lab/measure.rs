//! From the doorbell's records to figures.

use serde::{Deserialize, Serialize};

/// A ring that took longer tells little about the moment.
pub const UNDISTURBED_NS: u64 = 60_000;
/// The guests ring more often during so many seconds at the end.
const LAST: f64 = 1.2;

/// One record of the doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// CLOCK_MONOTONIC_RAW of the host.
    pub raw: u64,
    /// The machine's own time.
    pub guest: u64,
    /// Ticks that the guest counted.
    pub ticks: u64,
    /// Passes of the job (bare metal) or CLOCK_REALTIME (Linux).
    pub passes: u64,
    /// Ticks that the guest found lost (bare metal) or CLOCK_BOOTTIME (Linux).
    pub lost: u64,
    /// What the guest's clock showed.
    pub clock: u64,
    /// How long the ring took; not told of the last one.
    pub trip: Option<u64>,
}

/// Reads the doorbell's file. A last line that is not whole is left out, as the machine may have been killed.
pub fn parse(text: &str) -> Vec<Ring> {
    let mut rings: Vec<Ring> = Vec::new();
    for line in text.lines() {
        let mut words = line.split(',').map(str::parse);
        let mut next = || words.next().and_then(Result::ok);
        let (Some(raw), Some(guest), Some(sequence)) = (next(), next(), next()) else { continue };
        let [Some(ticks), Some(passes), Some(lost), Some(trip), Some(clock)] = [(); 5].map(|()| next())
        else {
            continue;
        };
        if let Some(last) = rings.last_mut()
            && sequence > 0
        {
            last.trip = Some(trip);
        }
        rings.push(Ring { raw, guest, ticks, passes, lost, clock, trip: None });
    }
    rings
}

/// How far a clock was from the host's, over time, since its first ring: (seconds, seconds).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Course(pub Vec<(f64, f64)>);

impl Course {
    /// Of the guest's clock.
    pub fn of_clock(rings: &[Ring]) -> Course {
        Course::of(rings, |ring| ring.clock)
    }

    /// Of the machine's own time.
    pub fn of_machine(rings: &[Ring]) -> Course {
        Course::of(rings, |ring| ring.guest)
    }

    fn of(rings: &[Ring], value: impl Fn(&Ring) -> u64) -> Course {
        let mut good = rings.iter().filter(|ring| ring.trip.is_some_and(|trip| trip <= UNDISTURBED_NS));
        let Some(first) = good.next() else { return Course::default() };
        let since = |now: u64, then: u64| (i128::from(now) - i128::from(then)) as f64 / 1e9;
        let points = std::iter::once(first).chain(good).map(|ring| {
            let host = since(ring.raw, first.raw);
            (host, since(value(ring), value(first)) - host)
        });
        Course(points.collect())
    }

    pub fn end(&self) -> Option<(f64, f64)> {
        self.0.last().copied().filter(|(at, _)| *at > 0.0)
    }

    /// The greatest rate, in parts per million, over a window of at least `seconds`; None when it was shorter.
    pub fn worst(&self, seconds: f64) -> Option<f64> {
        let points = &self.0;
        let mut from = 0;
        let mut worst: Option<f64> = None;
        for &(at, skew) in points {
            // The latest point that is far enough back.
            while points[from + 1..].first().is_some_and(|next| at - next.0 >= seconds) {
                from += 1;
            }
            let (then, before) = points[from];
            if at - then >= seconds {
                let rate = (skew - before) / (at - then) * 1e6;
                worst = Some(worst.map_or(rate, |worst| if rate.abs() > worst.abs() { rate } else { worst }));
            }
        }
        worst
    }

    /// The farthest ahead of the last rings: that of a clock to which no tick is owed at the moment.
    pub fn drained(&self) -> Option<f64> {
        let end = self.end()?.0;
        self.0.iter().filter(|point| point.0 >= end - LAST).map(|point| point.1).reduce(f64::max)
    }

    /// The farthest behind that it ever was, in seconds.
    pub fn deepest(&self) -> f64 {
        self.0.iter().map(|point| -point.1).fold(0.0, f64::max)
    }

    /// At most about `count` of the points, ends and extremes among them.
    pub fn thinned(&self, count: usize) -> Course {
        let points = &self.0;
        let piece = points.len().div_ceil((count / 2).max(1)).max(1);
        if piece < 3 {
            return self.clone();
        }
        let mut kept = Vec::new();
        for part in points.chunks(piece) {
            let by_skew = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
            let (low, high) = (part.iter().min_by(by_skew), part.iter().max_by(by_skew));
            let mut both: Vec<(f64, f64)> = low.into_iter().chain(high).copied().collect();
            both.sort_by(|a, b| a.0.total_cmp(&b.0));
            both.dedup();
            kept.extend(both);
        }
        for end in [points.first(), points.last()].into_iter().flatten() {
            if !kept.contains(end) {
                kept.push(*end);
            }
        }
        kept.sort_by(|a, b| a.0.total_cmp(&b.0));
        Course(kept)
    }
}

/// What was measured in one cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Host seconds from the first to the last ring that counts.
    pub seconds: f64,
    /// How far the guest's clock gained on the host's raw clock, in seconds.
    pub error: f64,
    pub ppm: f64,
    /// The error once no tick is owed: the highest of the last second.
    pub drained: f64,
    /// That of the machine's own time.
    pub machine_ppm: f64,
    /// The worst window.
    pub minute_ppm: Option<f64>,
    pub ten_minutes_ppm: Option<f64>,
    /// The farthest behind, in seconds.
    pub deepest: f64,
    /// Ticks delivered per host second (those that the guest only added are not).
    pub ticks_per_second: f64,
    /// Ticks that the guest found lost and added.
    pub lost: u64,
    /// Passes of the job in a minute of the host's clock.
    pub passes_per_minute: f64,
    pub rings: usize,
    pub course: Course,
}

/// Figures of `rings`; None when there are not two good ones.
pub fn figures(rings: &[Ring], linux: bool) -> Option<Figures> {
    let course = Course::of_clock(rings);
    let (seconds, error) = course.end()?;
    let machine = Course::of_machine(rings).end()?;
    let (first, last) = (rings.first()?, rings.last()?);
    let all = (last.raw - first.raw) as f64 / 1e9;
    let lost = if linux { 0 } else { last.lost - first.lost };
    let ticks = (last.ticks - first.ticks).saturating_sub(lost);
    Some(Figures {
        seconds,
        error,
        ppm: error / seconds * 1e6,
        drained: course.drained()?,
        machine_ppm: machine.1 / machine.0 * 1e6,
        minute_ppm: course.worst(60.0),
        ten_minutes_ppm: course.worst(600.0),
        deepest: course.deepest(),
        ticks_per_second: ticks as f64 / all,
        lost,
        passes_per_minute: if linux { 0.0 } else { (last.passes - first.passes) as f64 * 60.0 / all },
        rings: rings.len(),
        course,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that gains `ppm` and rings each second, in the file's form.
    fn file(seconds: u64, ppm: i64) -> String {
        let mut text = "raw_ns,guest_ns,sequence,values...\n".to_owned();
        for at in 0..=seconds {
            let raw = 5_000_000_000 + at * 1_000_000_000;
            let clock = 1_000_000_000 + at as i64 * (1_000_000_000 + ppm * 1000);
            text.push_str(&format!(
                "{raw},{},{at},{},{},0,9000,{clock}\n",
                at * 1_000_000_000,
                at * 1000,
                at * 2
            ));
        }
        text
    }

    #[test]
    fn a_steady_clock() {
        let rings = parse(&file(700, -50));
        assert_eq!(rings.len(), 701);
        let figures = figures(&rings, false).unwrap();
        // The last ring's length is not known, so it does not count.
        assert_eq!(figures.seconds, 699.0);
        assert!((figures.ppm + 50.0).abs() < 1e-6 && (figures.error + 0.03495).abs() < 1e-9);
        assert!((figures.minute_ppm.unwrap() + 50.0).abs() < 1e-6);
        assert!((figures.ten_minutes_ppm.unwrap() + 50.0).abs() < 1e-6);
        assert!(figures.machine_ppm.abs() < 1e-6);
        assert!((figures.ticks_per_second - 1000.0).abs() < 1e-9);
        assert!((figures.passes_per_minute - 120.0).abs() < 1e-9);
        assert!((figures.deepest - 0.03495).abs() < 1e-9);
        assert_eq!(super::figures(&parse(&file(30, 7)), false).unwrap().minute_ppm, None);
    }

    #[test]
    fn the_worst_window_finds_a_cliff() {
        let mut points: Vec<(f64, f64)> = (0..=1000).map(|at| (f64::from(at), 0.0)).collect();
        for point in &mut points[500..] {
            point.1 = -0.06;
        }
        let course = Course(points);
        assert!((course.worst(60.0).unwrap() + 1000.0).abs() < 1e-6);
        assert!((course.worst(600.0).unwrap() + 100.0).abs() < 1e-6);
        assert_eq!(course.worst(1001.0), None);
        let thin = course.thinned(20);
        assert!(thin.0.len() <= 24 && thin.end() == course.end() && thin.0.contains(&(0.0, 0.0)));
    }

    #[test]
    fn disturbed_rings_and_broken_lines_are_left_out() {
        let text = "raw_ns,guest_ns,sequence,values...\n\
                    1000000000,0,0,0,0,0,0,1000000000\n\
                    2500000000,0,1,0,0,0,500,2000000000\n\
                    3000000000,0,2,0,0,0,900000,3000000000\n\
                    4000000000,0,3,0,0,0,700,4000000000\n\
                    50000";
        let rings = parse(text);
        let trips: Vec<Option<u64>> = rings.iter().map(|ring| ring.trip).collect();
        assert_eq!(trips, [Some(500), Some(900_000), Some(700), None]);
        let course = Course::of_clock(&rings);
        assert_eq!(course.0, [(0.0, 0.0), (2.0, 0.0)]);
        assert!(figures(&[], true).is_none() && parse("").is_empty());
    }
}
