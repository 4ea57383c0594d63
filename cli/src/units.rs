//! Sizes, durations and counts, as people write and read them.
use std::time::Duration;

pub(crate) use brep_replication::status::size_text as bytes;

/// Parses a size in bytes: `4096`, `64K`, `10G`, `1GiB`. Suffixes are powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let allowed = "a size is a whole number with an optional K, M, G, T, P or E (powers of 1024), \
                   as in 64M or 10G";
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    let number: u64 = match number.parse() {
        Ok(number) => number,
        Err(_) if digits > 0 => return Err(format!("{text} is too large: at most 16E - 1")),
        Err(_) => return Err(allowed.into()),
    };
    let suffix = suffix.to_ascii_lowercase();
    let suffix = suffix.strip_suffix("ib").unwrap_or(&suffix);
    let shift = match suffix {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return Err(allowed.into()),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large: at most 16E - 1"))
}

/// Parses a duration with its unit: `500ms`, `5s`, `1m30s`. Zero is refused.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    const LONGEST: Duration = Duration::from_secs(24 * 3600);
    let allowed = "a duration is a number with its unit, as in 500ms, 5s or 2m";
    match humantime::parse_duration(text) {
        // `humantime` takes a bare 0, which has no unit.
        Ok(_) if text.bytes().all(|byte| byte.is_ascii_digit()) => Err(allowed.into()),
        Ok(duration) if duration.is_zero() => Err("must be longer than nothing".into()),
        Ok(duration) if duration > LONGEST => Err("at most 24h".into()),
        Ok(duration) => Ok(duration),
        Err(_) => Err(allowed.into()),
    }
}

/// A duration, or none for the word `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Interval(pub(crate) Option<Duration>);

/// What one bit of a map stands for.
pub(crate) fn parse_granularity(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    if size.is_power_of_two() && (4 << 10..=16 << 20).contains(&size) {
        Ok(size)
    } else {
        Err("expected a power of two from 4K to 16M, such as 64K".to_owned())
    }
}

/// Parses an interval: a duration, or `off`.
pub(crate) fn parse_interval(text: &str) -> Result<Interval, String> {
    if text == "off" {
        return Ok(Interval(None));
    }
    parse_duration(text)
        .map(|duration| Interval(Some(duration)))
        .map_err(|error| format!("{error}; or off, for checkpoints on command only"))
}

/// Bytes a second, or none for the word `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate(pub(crate) Option<u64>);

/// Parses a rate: a size for each second, or `off`.
pub(crate) fn parse_rate(text: &str) -> Result<Rate, String> {
    // People write it with what it is per.
    let text = text.strip_suffix("/s").unwrap_or(text);
    match text {
        "off" => Ok(Rate(None)),
        text => match parse_size(text)? {
            rate @ 4096.. if i64::try_from(rate).is_ok() => Ok(Rate(Some(rate))),
            _ => Err("from 4K to 8E-1 a second, or off".into()),
        },
    }
}

/// A limit in bytes, or none for the word `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit(pub(crate) Option<u64>);

/// Parses a limit: a size of at least 1M, or `off`.
pub(crate) fn parse_limit(text: &str) -> Result<Limit, String> {
    match text {
        "off" => Ok(Limit(None)),
        text => match parse_size(text)? {
            limit if limit >= 1 << 20 => Ok(Limit(Some(limit))),
            _ => Err("at least 1M, or off".into()),
        },
    }
}

/// A factor, or none for the word `off`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Factor(pub(crate) Option<f64>);

/// Parses a factor of at least 1, or `off`.
pub(crate) fn parse_factor(text: &str) -> Result<Factor, String> {
    match (text, text.parse::<f64>()) {
        ("off", _) => Ok(Factor(None)),
        (_, Ok(factor)) if (1.0..=1000.0).contains(&factor) => Ok(Factor(Some(factor))),
        _ => Err("a number from 1 to 1000, as in 1.5, or off".into()),
    }
}

/// A count with its thousands apart: `1 234 567`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{a0}');
        }
        text.push(digit);
    }
    text
}

/// A duration as people read it, to two or three digits: `340 µs`, `12.3 ms`, `4.2 s`, `3 min`.
pub(crate) fn duration(duration: Duration) -> String {
    let micros = duration.as_micros();
    match micros {
        0..1_000 => format!("{micros} µs"),
        1_000..1_000_000 => {
            format!("{}.{} ms", micros / 1_000, micros / 100 % 10)
        }
        1_000_000..120_000_000 => format!("{}.{} s", micros / 1_000_000, micros / 100_000 % 10),
        120_000_000..7_200_000_000 => format!("{} min", micros / 60_000_000),
        _ => format!("{} h", micros / 3_600_000_000),
    }
}

/// How long ago something was, given in milliseconds.
pub(crate) fn age(milliseconds: u64) -> String {
    match milliseconds {
        0..1_000 => "less than a second".into(),
        _ => duration(Duration::from_millis(milliseconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        let table = [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("1k", 1 << 10),
            ("64K", 64 << 10),
            ("64M", 64 << 20),
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("3T", 3 << 40),
            ("15E", 15 << 60),
        ];
        for (text, size) in table {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
    }

    #[test]
    fn sizes_that_could_be_misread_are_refused() {
        for text in ["", "G", "-1", "1.5G", "10 G", "10GB", "10kb", "0x10", "1K1", "ten", "١"] {
            assert!(parse_size(text).unwrap_err().contains("64M or 10G"), "{text}");
        }
        for text in ["16E", "18446744073709551616", "99999999999999999999T"] {
            assert!(parse_size(text).unwrap_err().contains("too large"), "{text}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("1m30s"), Ok(Duration::from_secs(90)));
        for text in ["", "5", "0", "s", "-5s", "five", "1x"] {
            assert!(parse_duration(text).unwrap_err().contains("500ms"), "{text}");
        }
        assert!(parse_duration("0s").is_err());
        assert!(parse_duration("25h").is_err());
    }

    #[test]
    fn a_granularity_is_a_power_of_two_within_bounds() {
        for (text, size) in [("4K", 4096), ("65536", 65536), ("16M", 16 << 20)] {
            assert_eq!(parse_granularity(text), Ok(size));
        }
        for text in ["2K", "32M", "96K", "0"] {
            assert!(parse_granularity(text).unwrap_err().contains("power of two"), "{text}");
        }
    }

    #[test]
    fn an_interval_may_be_off() {
        assert_eq!(parse_interval("off"), Ok(Interval(None)));
        assert_eq!(parse_interval("1s"), Ok(Interval(Some(Duration::from_secs(1)))));
        assert!(parse_interval("never").unwrap_err().contains("off"));
    }

    #[test]
    fn rates_and_factors_may_be_off() {
        assert_eq!(parse_rate("off"), Ok(Rate(None)));
        assert_eq!(parse_rate("50M"), Ok(Rate(Some(50 << 20))));
        assert_eq!(parse_rate("50M/s"), Ok(Rate(Some(50 << 20))));
        for text in ["0", "1", "15E", "fast", "50M/h"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
        assert_eq!(parse_limit("off"), Ok(Limit(None)));
        assert_eq!(parse_limit("1G"), Ok(Limit(Some(1 << 30))));
        assert!(parse_limit("1000").is_err());
        assert_eq!(parse_factor("off"), Ok(Factor(None)));
        assert_eq!(parse_factor("1.5"), Ok(Factor(Some(1.5))));
        for text in ["0", "0.9", "-2", "inf", "NaN", "1,5"] {
            assert!(parse_factor(text).is_err(), "{text}");
        }
    }

    #[test]
    fn figures_are_read_at_a_glance() {
        assert_eq!(count(7), "7");
        assert_eq!(count(1_234_567), "1\u{a0}234\u{a0}567");
        assert_eq!(duration(Duration::from_micros(340)), "340 µs");
        assert_eq!(duration(Duration::from_micros(12_345)), "12.3 ms");
        assert_eq!(duration(Duration::from_millis(4_250)), "4.2 s");
        assert_eq!(duration(Duration::from_secs(180)), "3 min");
        assert_eq!(age(999), "less than a second");
        assert_eq!(age(1_200), "1.2 s");
    }
}
