-- The broker's clock in milliseconds.
return now()
