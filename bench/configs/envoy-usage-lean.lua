-- Reads the usage out of each answer and counts it, in variables of the worker's Lua state:
-- the cheapest place that there is. What was counted comes back on the route /bench/usage.
local byte, find, match, sub = string.byte, string.find, string.match, string.sub
local responses, read, write, output = 0, 0, 0, 0

-- Reads every usage in whole lines of text; a later one replaces an earlier one.
local function read_usages(seen, text)
  local at = find(text, '"usage"', 1, true)
  while at do
    local stop = find(text, "\n", at, true) or #text
    local found = sub(text, at, stop)
    seen.read = match(found, '"cache_read_input_tokens"%s*:%s*(%d+)') or seen.read
    seen.write = match(found, '"cache_creation_input_tokens"%s*:%s*(%d+)') or seen.write
    seen.output = match(found, '"output_tokens"%s*:%s*(%d+)') or seen.output
    at = find(text, '"usage"', stop, true)
  end
end

local function count(seen)
  if not seen.read then return end
  responses = responses + 1
  read = read + tonumber(seen.read)
  write = write + (tonumber(seen.write) or 0)
  output = output + (tonumber(seen.output) or 0)
end

function envoy_on_response(handle)
  local kind = match(handle:headers():get("content-type") or "", "^[^;]*")
  if kind == "application/json" then
    local seen = {}
    local body = handle:body()
    if body then read_usages(seen, body:getBytes(0, body:length())) end
    count(seen)
  elseif kind == "text/event-stream" then
    -- Only a line that a chunk does not end is kept.
    local seen, kept = {}, ""
    for chunk in handle:bodyChunks() do
      local text = chunk:getBytes(0, chunk:length())
      if kept ~= "" then text = kept .. text end
      read_usages(seen, text)
      kept = (text == "" or byte(text, -1) == 10) and "" or sub(text, match(text, ".*\n()") or 1)
    end
    count(seen)
  elseif kind == "text/plain" then
    handle:headers():add("x-bench-usage", responses .. " " .. read)
  end
end
