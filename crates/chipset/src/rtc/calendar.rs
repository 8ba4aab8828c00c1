//! Dates as the clock's registers hold them.

use std::fmt;

/// A date and time of the Gregorian calendar, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) year: u32,
    /// 1-12.
    pub(super) month: u8,
    /// 1-31.
    pub(super) day: u8,
    /// 1-7, 1 is Sunday.
    pub(super) weekday: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

const DAYS_IN_400_YEARS: i128 = 146_097;
/// Days from 1 March of the year 0 to 1 January 1970.
const EPOCH: i128 = 719_468;

/// Days before the first of `month` in a year that starts in March (month 0 = March).
fn days_before(month: i128) -> i128 {
    (153 * month + 2) / 5
}

impl DateTime {
    /// The date `seconds` after the Unix epoch; dates outside of the years 0-9999 show as the nearest.
    pub(super) fn from_seconds(seconds: i128) -> DateTime {
        // 0000-03-01 and 9999-12-31T23:59:59.
        let seconds = seconds.clamp(-EPOCH * 86_400, 253_402_300_799);
        let (days, of_day) = (seconds.div_euclid(86_400) + EPOCH, seconds.rem_euclid(86_400));
        let (cycle, day) = (days / DAYS_IN_400_YEARS, days % DAYS_IN_400_YEARS);
        // Leap days: one every 4 years, none every 100, and the last day of the cycle is one.
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let of_year = day - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        let in_next_year = month >= 10; // January and February
        DateTime {
            year: (cycle * 400 + year + i128::from(in_next_year)) as u32,
            month: (if in_next_year { month - 9 } else { month + 3 }) as u8,
            day: (of_year - days_before(month) + 1) as u8,
            // 1 March of the year 0 was a Wednesday.
            weekday: ((days + 3) % 7 + 1) as u8,
            hour: (of_day / 3600) as u8,
            minute: (of_day / 60 % 60) as u8,
            second: (of_day % 60) as u8,
        }
    }

    /// Seconds since the Unix epoch; fields that are out of range count as the nearest that is in range.
    pub(super) fn to_seconds(self) -> i128 {
        let month = i128::from(self.month.clamp(1, 12));
        let year = i128::from(self.year.min(9999)) - i128::from(month < 3);
        let (cycle, of_cycle) = (year.div_euclid(400), year.rem_euclid(400));
        let days = cycle * DAYS_IN_400_YEARS + 365 * of_cycle + of_cycle / 4 - of_cycle / 100
            + days_before((month + 9) % 12)
            + i128::from(self.day.clamp(1, 31) - 1)
            - EPOCH;
        days * 86_400
            + i128::from(self.hour.min(23)) * 3600
            + i128::from(self.minute.min(59)) * 60
            + i128::from(self.second.min(59))
    }
}

impl fmt::Display for DateTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DateTime { year, month, day, hour, minute, second, .. } = self;
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

/// How register B says that numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    pub(super) binary: bool,
    pub(super) hours24: bool,
}

impl Format {
    pub(super) fn encode(self, value: u8) -> u8 {
        if self.binary { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    pub(super) fn decode(self, raw: u8) -> u8 {
        if self.binary { raw } else { (raw >> 4) * 10 + (raw & 0xf) }
    }

    pub(super) fn encode_hour(self, hour: u8) -> u8 {
        if self.hours24 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { 0x80 } else { 0 };
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    pub(super) fn decode_hour(self, raw: u8) -> u8 {
        if self.hours24 {
            return self.decode(raw);
        }
        self.decode(raw & 0x7f) % 12 + if raw & 0x80 != 0 { 12 } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::{DateTime, Format};

    #[test]
    fn known_dates() {
        for (seconds, text, weekday) in [
            (0, "1970-01-01T00:00:00Z", 5),
            (951_782_399, "2000-02-28T23:59:59Z", 2),
            (951_782_400, "2000-02-29T00:00:00Z", 3),
            (951_868_800, "2000-03-01T00:00:00Z", 4),
            (4_107_542_399, "2100-02-28T23:59:59Z", 1),
            (4_107_542_400, "2100-03-01T00:00:00Z", 2),
            (1_795_500_000, "2026-11-24T06:00:00Z", 3),
            (-1, "1969-12-31T23:59:59Z", 4),
            (-2_208_988_800, "1900-01-01T00:00:00Z", 2),
            (253_402_300_799, "9999-12-31T23:59:59Z", 6),
        ] {
            let date = DateTime::from_seconds(seconds);
            assert_eq!((date.to_string().as_str(), date.weekday), (text, weekday), "{seconds}");
            assert_eq!(date.to_seconds(), seconds);
        }
    }

    #[test]
    fn every_day_of_eight_centuries_goes_both_ways() {
        let mut last = DateTime::from_seconds(-86_400 * 150_000);
        for day in -149_999i128..150_000 {
            let date = DateTime::from_seconds(day * 86_400);
            assert_eq!(date.to_seconds(), day * 86_400);
            assert_eq!(date.weekday, last.weekday % 7 + 1);
            let next_day = date.day == last.day + 1 && date.month == last.month && date.year == last.year;
            assert!(next_day || date.day == 1, "{date}");
            last = date;
        }
    }

    #[test]
    fn garbage_is_a_date_too() {
        let date =
            DateTime { year: 16_665, month: 165, day: 0, weekday: 0, hour: 177, minute: 255, second: 165 };
        assert_eq!(DateTime::from_seconds(date.to_seconds()).to_string(), "9999-12-01T23:59:59Z");
        DateTime::from_seconds(i128::from(u64::MAX) * 1000);
        DateTime::from_seconds(-i128::from(u64::MAX) * 1000);
    }

    #[test]
    fn hours_in_four_formats() {
        for binary in [false, true] {
            for hours24 in [false, true] {
                let format = Format { binary, hours24 };
                for hour in 0..24 {
                    assert_eq!(format.decode_hour(format.encode_hour(hour)), hour);
                }
            }
        }
        let format = Format { binary: false, hours24: false };
        for (hour, raw) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)] {
            assert_eq!(format.encode_hour(hour), raw);
        }
    }
}
