//! What a kernel log says that it would not say on a good machine.

/// One such line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The line.
    pub line: String,
    /// No machine may ever show this.
    pub fatal: bool,
}

/// What no machine may ever show.
const FATAL: &[&str] = &[
    "BUG:",
    "WARNING:",
    "Call Trace",
    "Kernel panic",
    "Oops",
    "general protection",
    "hung task",
    "blocked for more than",
    "soft lockup",
    "hard LOCKUP",
    "rcu: INFO",
    "detected stall",
    "segfault at",
    "traps:",
    "I/O error",
    "nobody cared",
    "Spurious APIC",
    "timer doesn't work",
    "Marking clocksource",
    "NMI handler",
    "Hardware Error",
];

/// Parts of words that need a look wherever they stand (the line in small letters).
const SUSPECT: &[&str] = &[
    "error",
    "fail",
    "warn",
    "bug",
    "unable",
    "cannot",
    "can't",
    "could not",
    "timeout",
    "timed out",
    "bogus",
    "corrupt",
    "unexpected",
    "unstable",
    "taint",
    "lost",
];

/// Lines with suspect words that a good machine shows as well.
const GOOD: &[&str] = &[
    // The initial RAM disk tries to mount the root disk for writing first; in most tests it is read-only.
    "/dev/vda: Can't open blockdev",
    // Advice that is printed on every machine.
    "if necessary, use \"pci=nocrs\" and report a bug",
    // A filesystem's way of naming its mount options.
    "errors=",
];

/// The findings in a kernel log: as the console shows it, or as `dmesg -x` does (then every line from level
/// `warn` up is one). Lines that are none of the kernel's are passed over.
#[must_use]
pub fn findings(log: &str) -> Vec<Finding> {
    log.lines().filter_map(finding).collect()
}

fn finding(line: &str) -> Option<Finding> {
    let (level, text) = kernel_line(line)?;
    let fatal = FATAL.iter().any(|word| text.contains(word));
    let leveled = ["emerg", "alert", "crit", "err", "warn"].contains(&level);
    let small = text.to_lowercase();
    let suspect = leveled || SUSPECT.iter().any(|word| small.contains(word));
    let good = GOOD.iter().any(|good| text.contains(good));
    (fatal || suspect && !good).then(|| Finding { line: line.to_owned(), fatal })
}

/// Level (empty if it is not shown) and text of a line of the kernel's, known by its time stamp
/// `[    1.234567] `. An answer of the shell without its line end may stand before.
fn kernel_line(line: &str) -> Option<(&str, &str)> {
    let (before, rest) = line.split_once('[')?;
    let (stamp, text) = rest.split_once("] ")?;
    let (seconds, micros) = stamp.split_once('.')?;
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let level = before.strip_prefix("kern").and_then(|s| s.split(':').nth(1)).unwrap_or_default().trim();
    (digits(seconds.trim_start()) && micros.len() == 6 && digits(micros)).then_some((level, text))
}

#[cfg(test)]
mod tests {
    use super::findings;

    #[test]
    fn complaints_are_found_and_good_lines_are_not() {
        let log = "kern  :info  : [    0.100000] Linux version 6.1\n\
                   kern  :warn  : [    0.200000] something odd\n\
                   kern  :info  : [    0.300000] disk: probe Failed with -5\n\
                   kern  :err   : [    0.400000] /dev/vda: Can't open blockdev\n\
                   an answer: BUG: 3 errors [ 1.2] x\n\
                   half a line[    9.900000] watchdog: BUG: soft lockup - CPU#1 stuck for 26s!\n";
        let found = findings(log);
        assert_eq!(found.iter().map(|f| f.fatal).collect::<Vec<_>>(), [false, false, true]);
        assert!(found[1].line.contains("probe Failed"));
    }
}
