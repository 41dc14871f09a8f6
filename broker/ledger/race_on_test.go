//go:build race

package ledger

// raceDetector makes SQLite ten times as slow: what is repeated for breadth, not
// for races, is repeated less.
const raceDetector = true
