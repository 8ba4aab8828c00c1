//! The whole bench as an SVG chart: how many times slower than this machine itself, on a logarithmic scale.

use std::fmt::Write;

use super::table::{Table, Work};

const LEFT: f64 = 110.0;
const WIDTH: f64 = 640.0;
const ROW: f64 = 26.0;
const TOP: f64 = 64.0;
/// From half of native time to 200 times.
const RANGE: (f64, f64) = (0.5, 200.0);

/// Readable on light and on dark paper.
const STYLE: &str = "<style>.paper{fill:#fff}text{fill:#1f2328}.q{fill:#a3a9b3}.w{fill:#1f6feb}\
                     .line{stroke:#ddd}.one{stroke:#57606a}\n@media (prefers-color-scheme:dark){.paper{fill:#0d1117}\
                     text{fill:#e6edf3}.q{fill:#6e7681}.w{fill:#58a6ff}.line{stroke:#30363d}.one{stroke:#8b949e}}\
                     </style>";

fn x(ratio: f64) -> f64 {
    let (low, high) = RANGE;
    LEFT + WIDTH * (ratio.clamp(low, high) / low).ln() / (high / low).ln()
}

/// The chart of the rows that ran natively too.
pub fn svg(table: &Table) -> String {
    let works: Vec<&Work> = table.works.iter().filter(|work| work.ours_over_native().is_some()).collect();
    let bottom = TOP + works.len() as f64 * ROW;
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {:.0} {:.0}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n{STYLE}\n<rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"15\">Times slower than native (shorter is better)</text>\n\
         <rect x=\"{LEFT}\" y=\"30\" width=\"12\" height=\"10\" class=\"q\"/><text x=\"{:.0}\" y=\"39\">QEMU, \
         tcg</text>\n<rect x=\"{:.0}\" y=\"30\" width=\"12\" height=\"10\" class=\"w\"/><text x=\"{:.0}\" \
         y=\"39\">Wardian</text>",
        LEFT + WIDTH + 60.0,
        bottom + 30.0,
        LEFT + 18.0,
        LEFT + 110.0,
        LEFT + 128.0
    );
    for mark in [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0] {
        let (at, class) = (x(mark), if mark == 1.0 { "one" } else { "line" });
        let _ = writeln!(
            out,
            "<path d=\"M{at:.1} {TOP}V{bottom:.1}\" class=\"{class}\"/><text x=\"{at:.1}\" y=\"{:.1}\" \
             text-anchor=\"middle\">{mark}</text>",
            bottom + 16.0
        );
    }
    for (index, work) in works.iter().enumerate() {
        let top = TOP + index as f64 * ROW + 3.0;
        let _ = writeln!(
            out,
            "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            top + 14.0,
            work.row.name
        );
        for (ratio, down, class) in
            [(work.qemu_over_native(), 0.0, "q"), (work.ours_over_native(), 10.0, "w")]
        {
            let Some(ratio) = ratio else { continue };
            let (end, y) = (x(ratio), top + down);
            let _ = writeln!(
                out,
                "<rect class=\"b {class}\" x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"9\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"10\">{ratio:.1}</text>",
                end - LEFT,
                end + 4.0,
                y + 8.5
            );
        }
    }
    out.push_str("</svg>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::work;
    use super::*;

    #[test]
    fn bars_of_rows() {
        let works = vec![work("xz", "user", 1.0, 1e6, 2.0), Work::default()];
        let mut table = Table { works, ..Table::default() };
        let chart = svg(&table);
        assert_eq!(chart.matches("class=\"b ").count(), 2);
        assert!(chart.contains(">xz<") && chart.contains(">2.0<") && chart.ends_with("</svg>\n"));
        assert!(!chart.contains("NaN") && !chart.contains("inf"));
        table.works.clear();
        assert_eq!(svg(&table).matches("class=\"b ").count(), 0);
    }
}
