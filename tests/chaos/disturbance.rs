//! What is done to the AWS calls about one subject: the throttle matrix and the kill matrix.

use aws_proxy::rules::{Effect, Rule};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use std::fmt;

/// A call that a workflow makes: part of the function's name, and the operation. Without a function, a state machine's own task.
pub(crate) type Point = (Option<&'static str>, &'static str);

/// How long an outage lasts in a slice of the cases, in seconds; the long run says so itself.
const OUTAGE_SECONDS: u64 = 25;

/// Calls that are disturbed. Without a point, whichever call about the subject comes at that place.
#[derive(Debug, Clone)]
pub(crate) struct Disturbance {
    point: Option<Point>,
    skip: u32,
    times: u32,
    lasts: Option<u64>,
    effect: Effect,
}

impl Disturbance {
    /// The first so many cases kill before and after each of these calls, one by one; what comes after them is made up.
    pub(crate) fn kill_in_turn(random: &mut StdRng, points: &[Point], turn: usize) -> Self {
        let functions = of_functions(points);
        match functions.get(turn / 2) {
            Some(point) => {
                let effect = if turn.is_multiple_of(2) { Effect::KillBefore } else { Effect::KillAfter };
                Self { point: Some(*point), skip: 0, times: 1, lasts: None, effect }
            }
            None => Self::kill(random, points),
        }
    }

    /// Where it disturbs, if not anywhere.
    pub(crate) fn point(&self) -> Option<Point> {
        self.point
    }

    /// A function that is killed before or after a call: at one of these points, or anywhere.
    pub(crate) fn kill(random: &mut StdRng, points: &[Point]) -> Self {
        let functions = of_functions(points);
        let effect = if random.random() { Effect::KillBefore } else { Effect::KillAfter };
        Self::somewhere(random, &functions, effect, 1)
    }

    /// An API that refuses or fails some times, answers late, or whose answer is lost.
    pub(crate) fn refuse(random: &mut StdRng, points: &[Point]) -> Self {
        let times = random.random_range(1..=6);
        let (effect, times) = match random.random_range(0..6) {
            0..=2 => (Effect::Throttle, times),
            3 => (Effect::Unavailable, times),
            4 => (Effect::LoseAnswer, 1),
            _ => (Effect::Delay(random.random_range(500..4000)), times),
        };
        let functions = of_functions(points);
        // Step Functions sees to the answers of its own calls.
        let points = if effect == Effect::LoseAnswer { &functions } else { points };
        Self::somewhere(random, points, effect, times)
    }

    /// An API that is out for longer than any retry within a call (eight seconds, `fleet::aws::CALL_LIMIT`): three times as long and
    /// more. What goes on then goes on because a queue delivers again, or a state is tried again.
    pub(crate) fn outage(random: &mut StdRng, points: &[Point]) -> Self {
        let point = points.choose(random).copied();
        let effect = if random.random() { Effect::Unavailable } else { Effect::Throttle };
        Self { point, skip: random.random_range(0..2), times: 1, lasts: Some(outage_milliseconds()), effect }
    }

    /// An API that fails for a short time or for a long one.
    pub(crate) fn fail(random: &mut StdRng, points: &[Point]) -> Self {
        if random.random() { Self::outage(random, points) } else { Self::refuse(random, points) }
    }

    /// The account's calls of every API are refused, whatever they are about.
    pub(crate) fn of_the_account() -> Rule {
        Rule {
            name: "account".to_owned(),
            contains: String::new(),
            function: Some(String::new()),
            operation: None,
            skip: 0,
            times: 1,
            lasts: Some(outage_milliseconds()),
            effect: Effect::Throttle,
        }
    }

    fn somewhere(random: &mut StdRng, points: &[Point], effect: Effect, times: u32) -> Self {
        let named = random.random_bool(0.6);
        let point = if named { points.choose(random).copied() } else { None };
        // The same call is made a few times about a subject, and all of them together some twenty times.
        let skip = if named { random.random_range(0..3) } else { random.random_range(0..20) };
        Self { point, skip, times, lasts: None, effect }
    }

    /// The proxy's rule for the calls that have the case's name in them.
    pub(crate) fn rule(&self, case: &str) -> Rule {
        let (function, operation) = self.point.unzip();
        Rule {
            name: case.to_owned(),
            contains: case.to_owned(),
            function: function.flatten().map(str::to_owned),
            operation: operation.map(str::to_owned),
            skip: self.skip,
            times: self.times,
            lasts: self.lasts,
            effect: self.effect,
        }
    }
}

fn outage_milliseconds() -> u64 {
    let seconds = std::env::var("FLEETFLOW_CHAOS_OUTAGE_SECONDS").ok();
    seconds.map_or(OUTAGE_SECONDS, |text| text.parse().expect("a number of seconds")) * 1000
}

/// The points that are calls of functions.
fn of_functions(points: &[Point]) -> Vec<Point> {
    points.iter().copied().filter(|(function, _)| function.is_some()).collect()
}

impl fmt::Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { point, skip, times, lasts, effect } = self;
        let how_long =
            lasts.map_or_else(|| format!("{times}x"), |milliseconds| format!("for {} s", milliseconds / 1000));
        write!(f, "{effect:?} {how_long} from call {} of ", skip + 1)?;
        f.write_str(&point.map_or_else(|| "any".to_owned(), name))
    }
}

/// What people call a point.
pub(crate) fn name((function, operation): Point) -> String {
    function.map_or_else(|| format!("the state machine's {operation}"), |function| format!("{function} {operation}"))
}
