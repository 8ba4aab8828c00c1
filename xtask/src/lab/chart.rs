//! The chart: skew over time, one line for each guest and policy, in the spirit of the graph that was posted to
//! the xen-devel list in February 2008.

use std::fmt::Write as _;

use super::cell::{Activity, Device, Guest, Load, Policy, word};
use super::run::Outcome;

const COLOURS: [&str; 8] =
    ["#1f6f8b", "#d1495b", "#c98a1b", "#3c8d53", "#7d4f9e", "#8a5a33", "#444444", "#00908f"];
const DASHES: [&str; 4] = ["", "7 3", "2 3", "8 3 2 3"];
/// One panel and what is around it.
const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 80.0;
const HEAD: f64 = 76.0;
const ABOVE: f64 = 50.0;
const BELOW: f64 = 48.0;
const LEGEND: f64 = 270.0;
/// Points of a line at most.
const POINTS: usize = 400;

/// Guests whose lines belong into one panel, as their skew is of one size; and which policies, if not all:
/// those that conserve ticks, or the others.
const PANELS: [(&str, &[Guest], Option<bool>); 4] = [
    ("A guest that counts ticks", &[Guest::Count], None),
    (
        "One that counts and compensates (Linux 2.6), missed ticks not replayed",
        &[Guest::Compensate],
        Some(false),
    ),
    ("The same, missed ticks replayed: it counts them twice", &[Guest::Compensate], Some(true)),
    ("Debian, Linux 6.1", &[Guest::Linux, Guest::LinuxJiffies, Guest::LinuxHpet, Guest::LinuxPm], None),
];
/// Of these the first that was measured is drawn, if they were measured for as long.
const LOADS: [Load; 8] = [
    Load::Stop,
    Load::Cpu3,
    Load::Cpu2,
    Load::Cgroup100,
    Load::Cgroup10,
    Load::Disk,
    Load::Pause,
    Load::None,
];

struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

struct Panel {
    title: &'static str,
    about: String,
    lines: Vec<Line>,
}

fn about(load: Load) -> &'static str {
    match load {
        Load::None => "no load of ours",
        Load::Cpu2 => "two busy guests on each core",
        Load::Cpu3 => "three busy guests on each core",
        Load::Disk => "a neighbour reads its disk",
        Load::Stop => "stopped at random, 1 ms to 5 s, half of the time",
        Load::Cgroup10 => "half a processor, by 10 ms",
        Load::Cgroup100 => "half a processor, by 100 ms",
        Load::Pause => "paused once",
    }
}

fn panels(outcomes: &[Outcome]) -> Vec<Panel> {
    let mut panels = Vec::new();
    for (title, guests, conserving) in PANELS {
        let one = guests.len() == 1;
        let mut cells: Vec<&Outcome> = outcomes
            .iter()
            .filter(|o| guests.contains(&o.cell.guest) && o.figures.is_some())
            .filter(|o| conserving.is_none_or(|wanted| o.cell.policy.conserves() == wanted))
            .filter(|o| o.cell.activity != Activity::Job)
            .collect();
        // The longest cells show most. Of several loads, timers and seeds one stands for all.
        keep_least(&mut cells, |o| std::cmp::Reverse(o.cell.seconds));
        keep_least(&mut cells, |o| LOADS.iter().position(|load| *load == o.cell.load));
        let timer = cells.iter().map(|o| o.cell.device).min();
        cells.retain(|o| Some(o.cell.device) == timer || o.cell.device == Device::Any);
        keep_least(&mut cells, |o| o.cell.seed);
        let Some(load) = cells.first().map(|o| o.cell.load) else { continue };
        let device = match cells[0].cell.device {
            _ if !one => String::new(),
            device => format!("{} at {} Hz; ", word(&device).to_uppercase(), cells[0].cell.hz),
        };
        let lines = cells
            .iter()
            .filter_map(|o| {
                let figures = o.figures.as_ref()?;
                Some(Line { name: name(o, !one), points: figures.course.thinned(POINTS).0 })
            })
            .collect();
        panels.push(Panel { title, about: format!("{device}{}", about(load)), lines });
    }
    panels
}

/// Leaves those of `cells` whose key is the least.
fn keep_least<K: Ord>(cells: &mut Vec<&Outcome>, key: impl Fn(&Outcome) -> K) {
    if let Some(least) = cells.iter().map(|o| key(o)).min() {
        cells.retain(|o| key(o) == least);
    }
}

fn name(outcome: &Outcome, with_guest: bool) -> String {
    let cell = &outcome.cell;
    let policy = match cell.policy {
        Policy::Sync => "sync (SYNC of 2007)".to_owned(),
        Policy::LateOne => "late-one (MIXED)".to_owned(),
        Policy::Async => "async (ASYNC)".to_owned(),
        policy => word(&policy),
    };
    match (with_guest, cell.device) {
        (false, _) => policy,
        (true, Device::Any) => word(&cell.guest),
        (true, device) => format!("{} {} {}", word(&cell.guest), word(&device), word(&cell.policy)),
    }
}

/// Steps of 1, 2 or 5 that divide `span` into about `count` parts.
fn step(span: f64, count: f64) -> f64 {
    let rough = (span / count).max(1e-12);
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= rough * 0.999);
    factor.unwrap_or(10.0) * power
}

/// A value as an axis has it, with the digits that the steps need.
fn number(value: f64, step: f64) -> String {
    let digits = (-step.log10().floor()).max(0.0) as usize;
    let text = format!("{value:.digits$}");
    if text.trim_start_matches('-').chars().all(|digit| matches!(digit, '0' | '.')) {
        "0".to_owned()
    } else {
        text.replace('-', "\u{2212}")
    }
}

/// The unit in which `seconds` is easily read: its name and how many make a second.
fn unit(seconds: f64) -> (&'static str, f64) {
    match seconds {
        s if s >= 1.0 => ("seconds", 1.0),
        s if s >= 1e-3 => ("milliseconds", 1e3),
        _ => ("microseconds", 1e6),
    }
}

/// The chart as SVG.
pub fn svg(outcomes: &[Outcome]) -> String {
    let panels = panels(outcomes);
    let width = LEFT + WIDTH + LEGEND;
    let height = HEAD + panels.len() as f64 * (ABOVE + HEIGHT + BELOW);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" role=\"img\" aria-labelledby=\"t d\">\n\
         <title id=\"t\">Clock skew of Wardian's guests</title>\n\
         <desc id=\"d\">How far guests' clocks were from the host's raw clock over time, one line for each guest and \
         tick policy.</desc>\n\
         <style>text{{font:12px system-ui,sans-serif;fill:#222}}.h{{font-size:17px;font-weight:600}}\
         .s{{fill:#555}}.t{{font-weight:600}}.g{{stroke:#ddd}}.z{{stroke:#999}}.f{{fill:none;stroke:#333}}\
         .l{{fill:none;stroke-width:1.8;stroke-linejoin:round}}</style>\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n\
         <text class=\"h\" x=\"16\" y=\"28\">Clock skew: guest minus host, over time</text>\n\
         <text class=\"s\" x=\"16\" y=\"50\">By the doorbell and CLOCK_MONOTONIC_RAW; cargo xtask lab skew</text>\n"
    );
    for (index, panel) in panels.iter().enumerate() {
        draw(&mut out, panel, HEAD + index as f64 * (ABOVE + HEIGHT + BELOW) + ABOVE);
    }
    out.push_str("</svg>\n");
    out
}

/// Writes one panel with its upper edge at `top`. Writing to a string does not fail.
fn draw(out: &mut String, panel: &Panel, top: f64) {
    let all = || panel.lines.iter().flat_map(|line| &line.points);
    let end = all().map(|point| point.0).fold(1.0, f64::max);
    let (low, high) = all().fold((0.0f64, 0.0f64), |(low, high), p| (low.min(p.1), high.max(p.1)));
    let (name, scale) = unit(low.abs().max(high));
    let (low, high) = (low * scale, high * scale);
    let by = step((high - low).max(1e-3), 6.0);
    let (bottom, ceiling) =
        ((low / by).floor() * by, ((high / by).ceil() * by).max((low / by).floor() * by + by));
    let y = |value: f64| top + (ceiling - value) / (ceiling - bottom) * HEIGHT;
    let (time, minute) = if end > 300.0 { ("minutes", 60.0) } else { ("seconds", 1.0) };
    let x = |seconds: f64| LEFT + seconds / end * WIDTH;
    let (right, base) = (LEFT + WIDTH, top + HEIGHT);
    for (class, above, text) in [("t", 26.0, panel.title), ("s", 9.0, &panel.about)] {
        let _ = writeln!(out, "<text class=\"{class}\" x=\"{LEFT}\" y=\"{:.1}\">{text}</text>", top - above);
    }
    let mut value = bottom;
    while value <= ceiling + by / 2.0 {
        let class = if value.abs() < by / 2.0 { "z" } else { "g" };
        let _ = writeln!(
            out,
            "<path class=\"{class}\" d=\"M{LEFT} {at:.1}H{right}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            y(value) + 4.0,
            number(value, by),
            at = y(value)
        );
        value += by;
    }
    let along = step(end / minute, 8.0);
    let mut value = 0.0;
    while value <= end / minute + along / 1e3 {
        let at = x(value * minute);
        let _ = writeln!(
            out,
            "<path class=\"g\" d=\"M{at:.1} {top}V{base}\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            base + 17.0,
            number(value, along)
        );
        value += along;
    }
    let _ =
        writeln!(out, "<rect class=\"f\" x=\"{LEFT}\" y=\"{top}\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>");
    let middle = LEFT + WIDTH / 2.0;
    let _ = writeln!(
        out,
        "<text class=\"s\" x=\"{middle}\" y=\"{:.1}\" text-anchor=\"middle\">host time, {time}</text>",
        base + 35.0
    );
    let _ = writeln!(
        out,
        "<text class=\"s\" transform=\"translate(20 {:.1}) rotate(-90)\" text-anchor=\"middle\">skew, {name}</text>",
        top + HEIGHT / 2.0
    );
    for (index, line) in panel.lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let dash = DASHES[index % DASHES.len()];
        let mut path = String::new();
        for (place, (seconds, skew)) in line.points.iter().enumerate() {
            let _ = write!(
                path,
                "{}{:.1} {:.2}",
                if place == 0 { 'M' } else { 'L' },
                x(*seconds),
                y(skew * scale)
            );
        }
        let style = format!("stroke=\"{colour}\" stroke-dasharray=\"{dash}\"");
        let _ = writeln!(out, "<path class=\"l\" {style} d=\"{path}\"/>");
        let at = top + 12.0 + index as f64 * 19.0;
        let last = line.points.last().map_or(0.0, |point| point.1);
        let _ = writeln!(
            out,
            "<path class=\"l\" {style} d=\"M{:.1} {at:.1}h26\"/><text x=\"{:.1}\" y=\"{:.1}\">{}: {}</text>",
            right + 12.0,
            right + 44.0,
            at + 4.0,
            line.name,
            shown(last)
        );
    }
}

/// A skew in words.
fn shown(seconds: f64) -> String {
    let text = match seconds.abs() {
        s if s >= 1.0 => format!("{seconds:+.2} s"),
        s if s >= 1e-3 => format!("{:+.2} ms", seconds * 1e3),
        _ => format!("{:+.0} us", seconds * 1e6),
    };
    text.replace('-', "\u{2212}")
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::outcome;
    use super::*;

    #[test]
    fn lines_axes_and_legend() {
        let all = [
            outcome(Policy::Sync, Guest::Count, Load::Stop, -12_000.0),
            outcome(Policy::Replay, Guest::Count, Load::Stop, 1.0),
            outcome(Policy::Sync, Guest::Count, Load::Cpu3, 9.0),
            outcome(Policy::Sync, Guest::Compensate, Load::Cpu3, 9.0),
        ];
        let svg = svg(&all);
        // Two panels; of the counting guest only the load that comes first.
        assert_eq!(svg.matches("class=\"f\"").count(), 2);
        assert_eq!(svg.matches("class=\"l\"").count(), 2 * 3);
        for text in [
            "sync (SYNC of 2007): \u{2212}720.00 ms",
            "skew, milliseconds",
            "host time, seconds",
            "skew, microseconds",
        ] {
            assert!(svg.contains(text), "{text} in {svg}");
        }
        assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"));
        assert!(super::svg(&[]).ends_with("</svg>\n"));
    }

    #[test]
    fn steps_are_round() {
        for (span, want) in [(1.0, 0.2), (6.0, 1.0), (137.0, 50.0), (0.003, 0.0005)] {
            assert!((step(span, 6.0) / want - 1.0).abs() < 1e-9, "{span}: {}", step(span, 6.0));
        }
        assert_eq!([number(-0.2, 0.2), number(0.0, 5.0), number(40.0, 20.0)], ["\u{2212}0.2", "0", "40"]);
    }
}
